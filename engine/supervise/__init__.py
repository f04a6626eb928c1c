"""The parent's half of the engine's process: it starts the child, reads it, judges it, buries it.

A Link joins the four that own something each: the process itself (process.py), when it counts as
hung (watchdog.py), its socket's input (reader.py), and who waits for what it says (inbox.py).
"""
