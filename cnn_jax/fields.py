"""The fields of an experiment: names, defaults, and the values that they may have."""

from typing import Any

from ml_collections import ConfigDict

from cnn_jax import models


def default_config(model: str = 'cnn') -> ConfigDict:
  """The base that every file in `configs/` starts from: all fields, each read by something.

  Args:
    model: the network, whose fields are the section `model`; see `cnn_jax.models`.

  Returns:
    A locked `ConfigDict`: setting a field that is not here is an error.

  Raises:
    UsageError: there is no such network.
  """
  config = ConfigDict()
  config.seed = 0  # of initialisation, order, augmentation and dropout
  config.seeds = 1  # how many runs, one after another, from `seed`, `seed` + 1, ...
  config.batch_size = 128  # images per step over all devices of all processes
  config.epochs = 12  # passes over the training split
  config.init_from = ''  # workdir of a run whose weights to start from: fine-tuning
  config.min_steps = 0  # at least this many steps: a small set gets more epochs than `epochs`
  config.adapt_to_data = False  # smaller batches, another rate and warm-up for a small set; see small_sets.py

  config.data = data = ConfigDict()
  data.source = 'auto'  # tfds | folder | tar | bundled | auto (prepared TFDS set, else bundled)
  data.name = 'mnist'  # TFDS name, or the bundled set: mnist | digits
  data.dir = ''  # the image folder, that of the tar files, or the TFDS data directory ('': $TFDS_DATA_DIR)
  data.table = ''  # CSV or Parquet file of paths below `dir` (by default its own folder), labels and, if wanted, splits
  data.image_size = 0  # pixels a side of the model's input (0: as the set has it)
  data.canvas_size = 0  # pixels a side of the decoded images, whose centre is the input (0: image_size)
  data.channels = 0  # 1 grey, 3 RGB (0: as the set has it)
  data.resize = 'crop'  # other sizes: crop (shorter side, centre) | pad (letterbox) | stretch
  data.bit_depth = 0  # of the levels of 16-bit files: 8 | 10 | 12 | 14 | 16 (0: the fewest that hold those of the set)
  data.mean = ()  # level that becomes 0, one or one per channel; (): that of the weights of init_from, or 127.5
  data.std = ()  # levels that become a difference of 1, as many numbers; (): likewise
  data.on_bad_image = 'error'  # images that cannot be read: error | skip (leave them out, and list them in the record)
  data.validation = 0.1  # part of train held out for selection
  data.test = 0.1  # part held out for the test if the set has no test split of its own
  data.resident = 'auto'  # training images in memory: always | never (read during training) | auto (if they fit)
  data.megabytes = 4000  # of decoded images that fit into memory
  data.workers = 0  # processes that read images during training, for more than about 16 cores; 0: threads
  data.sampling = 'uniform'  # of an epoch: uniform (each image once) | balanced (each class equally often)
  data.split_seed = 0  # of the rule that carves them out; not `seed`, so that all seeds share a split

  config.augment = augment = ConfigDict()
  augment.image_size = 0  # pixels a side of the input in training, sampled from the decoded images (0: data.image_size)
  augment.shift = 0  # random translation by up to this many pixels each way
  augment.padding = 'constant'  # of the pixels that move in: constant (the level of the corners) | reflect
  augment.flip = False  # mirror left-right with probability 1/2
  augment.alternate = False  # if it flips: mirror a random half in the first epoch, then the other half, and so on
  augment.rotate = 0.0  # random rotation by up to this many degrees each way
  augment.scale = 0.0  # random zoom by a factor in [1 - scale, 1 + scale]
  augment.elastic = 0.0  # smooth random distortion: its standard deviation in pixels, 1 is much for 28 pixels a side
  augment.crop = 0.0  # random resized crop of at least this share of the area, aspect 3/4 to 4/3; 0: off
  augment.erase = 0.0  # probability of erasing a random rectangle
  augment.brightness = 0.0  # add a uniform number in [-b, b], of the range [0, 1]
  augment.contrast = 0.0  # multiply the distance to the mean by a factor in [1 - c, 1 + c]
  augment.saturation = 0.0  # multiply the distance to grey by a factor in [1 - s, 1 + s]
  augment.hue = 0.0  # turn the hue by up to this part of the circle each way
  augment.trivial = False  # TrivialAugment: one random operation of random strength per image; see data/trivial.py
  augment.mixup = 0.0  # alpha of mixup's Beta(alpha, alpha); 0: off
  augment.cutmix = 0.0  # alpha of CutMix's Beta(alpha, alpha); 0: off

  config.model = models.default_config(model)  # the fields of the network; see its file in cnn_jax/models/

  config.optimizer = optimizer = ConfigDict()
  optimizer.name = 'sgd'  # sgd | adamw | lion | muon | muon_sgd (see muon.py)
  optimizer.learning_rate = 0.1  # the schedule's peak
  optimizer.momentum = 0.9  # of sgd and muon; b1 of adamw and lion
  optimizer.nesterov = True  # sgd and muon
  optimizer.b2 = 0.999  # adamw and lion
  optimizer.weight_decay = 5e-3  # decoupled, times the learning rate; kernels only
  optimizer.head_rate = 0.1  # muon_sgd: the peak of the head; its weight_decay is divided by this
  optimizer.bias_rate = 0.1  # muon_sgd: the peak of biases and scales, likewise
  optimizer.sgd_momentum = 0.85  # muon_sgd: of head, biases and scales
  optimizer.first_stage_epochs = 0.0  # of training the first stage's biases, and never its kernels; 0: as all others
  optimizer.clip_norm = 0.0  # largest global gradient norm; 0: off
  optimizer.accumulate_steps = (
    1  # parts of a batch, one after another: less memory; batch norm normalises each by itself
  )
  optimizer.stage_rates = ()  # factors of the rate of the last stages, the head's last; earlier ones have the first

  config.fine_tuning = tuning = ConfigDict()  # of weights from `init_from`
  tuning.probe = 0.0  # start the head from a linear probe with this L2 penalty; 0: from random weights
  tuning.views = 0  # augmented views per image whose maps at the frozen boundary are computed once and kept; 0: none
  tuning.megabytes = 1000  # of such maps at most; if they need more, fewer views are kept

  config.schedule = schedule = ConfigDict()
  schedule.name = 'one_cycle'  # constant | cosine | one_cycle | linear
  schedule.warmup_epochs = 2.0  # linear from zero (one_cycle: cosine from a 25th of the peak)
  schedule.end = 0.0  # the last learning rate, as a fraction of the peak

  config.loss = loss = ConfigDict()
  loss.label_smoothing = 0.0
  loss.reduction = 'mean'  # over the batch: mean | sum
  loss.class_weights = ()  # balanced (as many images of each class would be), or a number per class; (): off

  config.evaluation = evaluation = ConfigDict()
  evaluation.batch_size = 1000  # images per call over all devices
  evaluation.every_epochs = 1  # epochs between validations; the last epoch always ends with one
  evaluation.min_steps = 20  # at least this many steps between validations: tiny epochs share one
  evaluation.views = False  # average over the flips and shifts of training (by a pixel), in validation and test too
  evaluation.view_rule = 'cross'  # cross: shifts to four sides | diagonal: to two corners; see evaluate.tta_views
  evaluation.patience = 0  # end after this many validations without a better score, at the best state; 0: off
  evaluation.ema_decay = 0.0  # evaluate an exponential average of parameters and statistics; 0: off

  config.checkpoint = checkpoint = ConfigDict()
  checkpoint.every_epochs = 1
  checkpoint.every_minutes = 10.0  # and inside long epochs
  checkpoint.keep = 2  # how many of the newest to keep, beside the best on validation

  config.log = log = ConfigDict()
  log.every_steps = 25  # steps per line of metrics.jsonl
  log.tensorboard = True
  log.trackers = ()  # experiment trackers that get the same numbers: wandb | mlflow
  log.report = True  # write report.html at the end, if one process trains alone
  return config.lock()


_LARGEST_SIDE = 8192  # pixels; an RGB image of 200 MB

# The values that fields may have; see `rules.check_value`. Those of the section `model` are in the file of the network.
RULES: dict[str, Any] = {
  'seed': 'seed',
  'data.split_seed': 'seed',
  'seeds': 'positive',
  'batch_size': 'positive',
  'epochs': 'positive',
  'data.source': ('auto', 'tfds', 'folder', 'tar', 'bundled'),
  'data.image_size': range(_LARGEST_SIDE + 1),
  'data.canvas_size': range(_LARGEST_SIDE + 1),
  'data.resize': ('crop', 'pad', 'stretch'),
  'data.channels': (0, 1, 3),
  'data.bit_depth': (0, 8, 10, 12, 14, 16),
  'data.on_bad_image': ('error', 'skip'),
  'data.resident': ('auto', 'always', 'never'),
  'data.megabytes': 'positive',
  'data.sampling': ('uniform', 'balanced'),
  'data.validation': 'below one',
  'data.test': 'below one',
  'augment.image_size': range(_LARGEST_SIDE + 1),
  'augment.padding': ('constant', 'reflect'),
  'augment.scale': 'below one',
  'augment.erase': 'at most one',
  'augment.brightness': 'below one',
  'augment.contrast': 'below one',
  'augment.saturation': 'below one',
  'augment.crop': 'at most one',
  'augment.hue': 'at most half',
  'optimizer.name': ('sgd', 'adamw', 'lion', 'muon', 'muon_sgd'),
  'optimizer.learning_rate': 'positive',
  'optimizer.head_rate': 'positive',
  'optimizer.bias_rate': 'positive',
  'optimizer.momentum': 'below one',
  'optimizer.sgd_momentum': 'below one',
  'optimizer.b2': 'below one',
  'optimizer.accumulate_steps': 'positive',
  'schedule.name': ('constant', 'cosine', 'one_cycle', 'linear'),
  'loss.label_smoothing': 'below one',
  'loss.reduction': ('mean', 'sum'),
  'evaluation.batch_size': 'positive',
  'evaluation.view_rule': ('cross', 'diagonal'),
  'evaluation.every_epochs': 'positive',
  'evaluation.ema_decay': 'below one',
  'checkpoint.every_epochs': 'positive',
  'checkpoint.every_minutes': 'positive',
  'checkpoint.keep': 'positive',
  'log.every_steps': 'positive',
}
