"""The checker behind the annotations: beartype, to which an int is also a float.

Constructors are left out: they answer a wrong type with errors of their own, which tests provoke.
"""

from beartype import BeartypeConf, beartype

strict = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function):
    return function if function.__name__ == "__init__" else strict(function)
