"""A VQ-VAE in about twenty lines, then the lines that make it a VQGAN:  python examples/vqgan_in_python.py FOLDER [EPOCHS]"""

import sys

import torch
from torch.nn.functional import l1_loss

from sfumato.losses.adversarial import discriminator_loss, generator_loss
from sfumato.parts import Decoder, Discriminator, Encoder, Quantizer, pictures

folder, epochs = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 20
train, test = pictures(folder, size=64)  # "n 3 64 64" in [-1, 1]; one in twenty is kept for the test
encoder, quantizer, decoder = Encoder(channels=8), Quantizer(num_embeddings=512, embedding_dim=8), Decoder(channels=8)
optimiser = torch.optim.Adam([*encoder.parameters(), *quantizer.parameters(), *decoder.parameters()], lr=1e-3)


def evaluate(name, epoch, total):
    with torch.no_grad():
        error, used = l1_loss(decoder(quantizer(encoder(test))[0]), test), (quantizer.counts > 0).float().mean()
    print(f"{name}, epoch {epoch + 1}: loss {total / len(train):.4f}, test error {error:.4f}, codes in use {used:.0%}")
    quantizer.forget()  # counts anew in the next epoch


# A VQ-VAE: the picture through a codebook and back.
for epoch in range(epochs):
    total = 0.0
    for x in train[torch.randperm(len(train))].split(64):
        z, code_loss, stats = quantizer(encoder(x))
        loss = l1_loss(decoder(z), x) + code_loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        quantizer.update(stats)  # codes that nothing chooses begin again
        total += loss.item() * len(x)
    evaluate("VQ-VAE", epoch, total)

# What makes it a VQGAN: a network that tells copies from pictures. It learns for a while first; then the codec is to deceive it.
discriminator = Discriminator(layers=2)
its_optimiser = torch.optim.Adam(discriminator.parameters(), lr=1e-4)
for epoch in range(epochs):
    total = 0.0
    for x in train[torch.randperm(len(train))].split(64):
        z, code_loss, stats = quantizer(encoder(x))
        y = decoder(z)
        loss = l1_loss(y, x) + code_loss
        if epoch >= epochs // 4:
            loss = loss + 0.02 * generator_loss("hinge", discriminator(y))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        quantizer.update(stats)
        its_optimiser.zero_grad()
        discriminator_loss("hinge", discriminator(x), discriminator(y.detach())).backward()
        its_optimiser.step()
        total += loss.item() * len(x)
    evaluate("VQGAN", epoch, total)
