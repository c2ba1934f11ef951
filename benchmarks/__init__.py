"""Measurements: each module here is a program, `python -m benchmarks.NAME`.

    train_step      a step of training, compared with other libraries
    overheads       what is paid once: tracing, compiling, importing
    many            many adapters of one base
    operations      the operations of a step one at a time
    learning_rates  learning rates for each initialisation of an adapter
    guard           counts of compiled steps, compared with those that are recorded
    tpu             counts of the TPU's compiler
    gpu             all that matters on one GPU, within minutes
    report          the page of what was measured

The folders are what they are made of; each imports from those above it only:

    models          cases, the numbers they start from, and the models in each framework
    contenders      ways to train or to serve
    running         processes that take turns, statistics, files of results
    reports         tables and figures of the page
    results         what was measured
"""
