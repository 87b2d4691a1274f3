"""One thread each: tests are small, and threads that wait for each other cost more than they bring."""

import torch

torch.set_num_threads(1)

# the scripts of the README train on import (test_integrations runs them); a stand-in is run by its tests
collect_ignore_glob = ["examples_*.py", "bench*.py", "readme.py", "standin_*.py"]
