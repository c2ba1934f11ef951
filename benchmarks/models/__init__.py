"""What is measured: cases, the numbers they start from, and the models in each framework."""
