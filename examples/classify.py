"""A trained run in a notebook: probabilities, intermediate maps, and where the evidence for a class is.

    python examples/classify.py RUN [IMAGE] [FIGURE.png]

Paste the cells into a notebook, or run the file as it is. Without IMAGE it classifies the first test image of the data
set that the run was trained on. With FIGURE.png it draws what it prints.
"""

# %% A run becomes a classifier. An image is a path, a Pillow image or an array of any size.
import sys
from typing import Any

import numpy as np

import cnn_jax

workdir: str | None
image: Any  # a path, or an array
workdir, image, figure_file = (*sys.argv[1:], None, None, None)[:3]
if workdir is None:
  sys.exit(__doc__)
classifier = cnn_jax.load(workdir)
print(f'{classifier.run.dataset}: {len(classifier.class_names)} classes, {classifier.run.step:,} steps')

# %% The image as the network reads it.
if image is None:
  from cnn_jax.run import load_run_dataset

  test = load_run_dataset(classifier.run).test
  image = np.asarray(test.images[0])
  print(f'the first test image, of class {classifier.class_names[test.labels[0]]}')
tensor = classifier.read(image)
print(f'the tensor: {tensor.dtype} {tensor.shape}, values {tensor.min()} to {tensor.max()}')

# %% One probability per class. Several images give one row each: classifier.predict([a, b]).shape == (2, classes).
probabilities = classifier.predict(image)
for i in np.argsort(-probabilities)[:3]:
  print(f'{classifier.class_names[i]:>12}  {probabilities[i]:.4f}')

# %% The intermediate maps: edges, textures, parts, objects; then their averages, and one logit per class.
maps = classifier.feature_maps(image)
for name, values in maps.items():
  print(f'{name:>12}  {values.shape}')

# %% The evidence for the most probable class and the second one, by place; exact with global average pooling.
best, second = np.argsort(-probabilities)[:2]
evidence = classifier.class_activation_map(image, int(best))
print(f'evidence for {classifier.class_names[best]}, by place:')
print(np.round(evidence, 1))

# %% All of it in one figure.
if figure_file:
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  stages = [name for name in maps if name.startswith('stage')]
  figure, axes = plt.subplots(1, len(stages) + 3, figsize=(2.2 * (len(stages) + 3), 2.6), layout='constrained')
  axes[0].imshow(tensor.squeeze(), cmap='gray')
  axes[0].set_title('input')
  for axis, name in zip(axes[1:], stages, strict=False):
    strongest = np.argmax(maps[name].max(axis=(0, 1)))
    axis.imshow(maps[name][..., strongest])
    axis.set_title(f'{name}, channel {strongest}')
  for axis, label in zip(axes[-2:], (best, second), strict=True):
    axis.imshow(classifier.class_activation_map(image, int(label)), cmap='magma')
    axis.set_title(f'for {classifier.class_names[label]}: {probabilities[label]:.3f}')
  for axis in axes:
    axis.axis('off')
  figure.savefig(figure_file, dpi=120)
  print(f'figure: {figure_file}')
