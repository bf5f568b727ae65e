"""A function of rows in groups, with parameters of each group's own: the experts of a mixture.

A backend is a module in this folder with `grouped_map(function, params, x, group_sizes, num_expected=None) -> out`, as
`xla.py` documents it.
"""
