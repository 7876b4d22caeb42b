"""Keep every name that is private in another library: an attribute or module that begins with `_`, and what a library
hangs onto objects without documenting it.

Such a name may go away, or change its meaning, in any release. Each has one function or constant here, in the module of
its library, whose docstring states why the name is needed and the release it was read in.
tests/test_library_internals.py fails when a name is gone or means something else, and when a private name is used
outside of this folder.
"""
