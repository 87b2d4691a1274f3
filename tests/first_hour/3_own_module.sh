# A module of one's own, in a file. net.py has build() and inputs(); trained.safetensors is its state dict.
edgetune lint py:net.py:build --inputs py:net.py:inputs
edgetune export py:net.py:build --inputs py:net.py:inputs --weights trained.safetensors -o net.pte
edgetune profile net.pte --device pixel-8
