"""Operations with several implementations: one folder per operation, one file per backend.

`precision.py` is what they share. In each folder `xla.py` is the reference that every other backend is tested
against.
"""
