"""What the programs wrote, as tables and figures: a file for each program."""
