"""Kernels for CPUs: C++ with the compiler's own vectors, called by XLA through its foreign function interface.

`build.py` compiles a file for the processor that it runs on, once, and registers what is in it.
"""
