"""A plain training loop. Only the lines marked `# edgetune` are added."""

import torch
from torch import nn
from torch.nn import functional

import edgetune as et  # edgetune

torch.manual_seed(0)
rows = torch.randn(512, 16)
labels = rows[:, :4].argmax(1)
model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
model = et.apply(model, [et.SparseUpdate(scheme={"4": "full"}), et.LoRA(rank=8, targets=["2"])])  # edgetune

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
losses = []
for _ in range(5):
    for batch in torch.randperm(len(rows)).split(32):
        loss = functional.cross_entropy(model(rows[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

model = et.finalize(model)  # edgetune
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
