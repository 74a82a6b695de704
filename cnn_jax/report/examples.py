"""Images of interest, with their class activation maps: confident mistakes and uncertain predictions."""

from typing import Any

import numpy as np

from cnn_jax import inspect
from cnn_jax.report import pictures
from cnn_jax.report.subject import Subject

MISTAKES, UNCERTAIN = 24, 15  # images shown of each kind


def select_examples(subject: Subject) -> dict[str, Any]:
  """Selects the mistakes with the highest confidence, and the images with the lowest."""
  wrong = np.flatnonzero(subject.predicted != subject.split.labels)
  mistakes = wrong[np.argsort(-subject.confidence[wrong], kind='stable')][:MISTAKES]
  uncertain = np.argsort(subject.confidence, kind='stable')[:UNCERTAIN]
  # A mistake is compared with the true class, an uncertain prediction with the second most probable class.
  second = np.argsort(-subject.logits, axis=1, kind='stable')[:, min(1, subject.logits.shape[1] - 1)]
  chosen = np.concatenate([mistakes, uncertain])
  others = np.concatenate([subject.split.labels[mistakes], second[uncertain]])
  pairs = np.stack([subject.predicted[chosen], others], axis=1)
  cards = [_card(subject, int(i), pair) for i, pair in zip(chosen, pairs, strict=True)]
  has_maps = _add_maps(subject, cards, chosen, pairs)
  return {
    'mistakes': cards[: len(mistakes)],
    'uncertain': cards[len(mistakes) :],
    'num_mistakes': len(wrong),
    'has_maps': has_maps,
  }


def _card(subject: Subject, index: int, pair: np.ndarray) -> dict[str, Any]:
  return {
    'name': subject.name(index),
    'picture': subject.picture(index),
    'true': subject.classes[subject.split.labels[index]],
    'sides': [{'class': subject.classes[c], 'probability': subject.probabilities[index, c]} for c in map(int, pair)],
  }


def _add_maps(subject: Subject, cards: list[dict[str, Any]], chosen: np.ndarray, pairs: np.ndarray) -> bool:
  """Adds the class activation maps of both classes to each card, if the network has them; returns whether it has."""
  averaged = []
  for found in subject.inside(chosen):
    if not (stages := inspect.averaged_stages(found.maps)):
      return False
    averaged.append({name: found.maps[name] for name in stages})
  maps = {name: np.concatenate([batch[name] for batch in averaged]) for name in averaged[0]}
  all_evidence = inspect.class_activation_maps(subject.run.variables, maps, pairs)
  for index, card, evidence in zip(map(int, chosen), cards, all_evidence, strict=True):
    scale = max(float(evidence.max()), 1e-9)
    for side, values, colour in zip(card['sides'], evidence, (pictures.ORANGE, pictures.BLUE), strict=True):
      side['map'] = subject.evidence(index, values / scale, colour)
  return True
