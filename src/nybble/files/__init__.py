"""Containers: which bytes, under which names. One container a file; none knows a method or a kernel layout."""
