"""Parts of a step done in one pass over memory by kernels of our own, built where the machine has a C compiler."""
