"""The run-time checker of annotations under test."""

from beartype import BeartypeConf, beartype

# An int is a float, as for static checkers.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
