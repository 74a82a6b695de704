"""A trained run in a notebook: probabilities, what the network sees, and where it looks.

    python examples/classify.py RUN [PICTURE] [FIGURE.png]

Paste the cells into a notebook, or run it as it is: without a picture it takes the first test image
of the run's own data set, and with a third argument it draws what it prints.
"""

# %% A run becomes a classifier; every command below takes any picture: a path, a Pillow image, an array.
import sys

import numpy as np

import cnn_jax

workdir, picture, figure_file = (*sys.argv[1:], None, None)[:3]
classifier = cnn_jax.load(workdir)
print(f'{classifier.run.dataset}: {len(classifier.class_names)} classes, {classifier.run.step:,} steps')

# %% Something to look at.
if picture is None:
  from cnn_jax.evaluate import load_run_dataset

  test = load_run_dataset(classifier.run).test
  picture = np.asarray(test.images[0])
  print(f'the first test image, of class {classifier.class_names[test.labels[0]]}')
tensor = classifier.read(picture)
print(f'the tensor: {tensor.dtype} {tensor.shape}, levels {tensor.min()} to {tensor.max()}')

# %% One probability a class. Several pictures give one row each: classifier.predict([a, b]).shape == (2, classes).
probabilities = classifier.predict(picture)
for i in np.argsort(-probabilities)[:3]:
  print(f'{classifier.class_names[i]:>12}  {probabilities[i]:.4f}')

# %% The same picture on its way: edges, textures, parts, objects; their averages; one number a class.
maps = classifier.feature_maps(picture)
for name, values in maps.items():
  print(f'{name:>12}  {values.shape}')

# %% Where the evidence for the class is, and for the runner-up: with global average pooling this is exact.
best, second = np.argsort(-probabilities)[:2]
evidence = classifier.class_activation_map(picture, int(best))
print(f'evidence for {classifier.class_names[best]}, by place:')
print(np.round(evidence, 1))

# %% All of it in one figure.
if figure_file:
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  blocks = [name for name in maps if name.startswith('block')]
  figure, axes = plt.subplots(1, len(blocks) + 3, figsize=(2.2 * (len(blocks) + 3), 2.6), layout='constrained')
  axes[0].imshow(tensor.squeeze(), cmap='gray')
  axes[0].set_title('input')
  for axis, name in zip(axes[1:], blocks, strict=False):
    strongest = np.argmax(maps[name].max(axis=(0, 1)))
    axis.imshow(maps[name][..., strongest])
    axis.set_title(f'{name}, channel {strongest}')
  for axis, label in zip(axes[-2:], (best, second), strict=True):
    axis.imshow(classifier.class_activation_map(picture, int(label)), cmap='magma')
    axis.set_title(f'for {classifier.class_names[label]}: {probabilities[label]:.3f}')
  for axis in axes:
    axis.axis('off')
  figure.savefig(figure_file, dpi=120)
  print(f'drawn: {figure_file}')
