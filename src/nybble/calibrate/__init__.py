"""Text and statistics that a method learns from, and the token windows that quality is measured on.

`windows` reads text and cuts it into token windows (no torch). Nothing here knows a number format or a method.
"""
