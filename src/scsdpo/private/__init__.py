"""Private names of other libraries, one module for each library; no other code uses any.

A private name can change in any release. `CHECKED` in each module says for which versions its names
were checked. tests/private/test_private_names.py checks each name against its docstring.
"""
