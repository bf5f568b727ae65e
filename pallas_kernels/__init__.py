"""Operations with several implementations: one folder per operation, one file per backend.

In each folder `xla.py` is the reference that every other backend is tested against.
"""
