"""The stopwatch that runs beside a program, here or on a device: stdlib, and torch and executorch where it times.

It imports nothing else of edgetune, so that these few files, zipped, are all that is shipped to a device.
"""
