"""The checker of types and array shapes that tests put on every function of the package."""

from beartype import BeartypeConf, beartype

# An int is a float, as type checkers have it.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
