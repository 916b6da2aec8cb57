"""Private names of other libraries, one module for each library, and none elsewhere.

A private name can change in any release. Each module says in `CHECKED` for which versions its names
were checked; tests/private/test_private_names.py holds each name to what its docstring says.
"""
