"""What turns a model into a graph that quantization and export read. Nothing is compiled here.

Of executorch only two helpers for such graphs are used: folding of constants, and placing a new one.
"""
