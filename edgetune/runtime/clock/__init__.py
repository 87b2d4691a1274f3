"""The stopwatch that times a program, here or on a device, with the standard library, torch and executorch.

It imports nothing else of edgetune, so that only these few files are copied to a device, zipped.
"""
