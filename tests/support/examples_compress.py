"""Prune, train, quantize and export your own network."""

import copy

import torch
from torch import nn
from torch.nn import functional

import edgetune as et

torch.manual_seed(0)
rows = torch.randn(512, 64)
labels = rows[:, :4].argmax(1)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 4))

sample = et.Sample(inputs=rows[:32], batches=lambda: iter(rows.split(32)))  # example inputs, calibration batches
model = et.apply(model, et.Prune(ratio=0.5), sample)  # 256 -> 128 units

optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
for batch in torch.arange(512).repeat(4).split(32):
    loss = functional.cross_entropy(model(rows[batch]), labels[batch])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())

model = et.finalize(model)
int4 = et.apply(copy.deepcopy(model), et.Int4(group_size=32))  # 4-bit weights, activations quantized as it runs
int8 = et.apply(copy.deepcopy(model), et.Int8(), sample)  # 8-bit weights and activations, scales from the sample
for name, version in {"fp32": model, "int4": int4, "int8": int8}.items():
    print(et.export(version, rows[:32], f"{name}.pte", one_row=True))
