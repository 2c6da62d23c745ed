__version__ = "0.1.0"

import os, sys
if 'torch' not in sys.modules: os.environ.setdefault('OMP_WAIT_POLICY', 'passive')   # torch reads it when it is loaded

from .text import Alphabet, canonical, quotients
from .corpus import Corpus, load_corpus, synthetic
from .model import LanguageModel, load_pretrained
from .recurrence import CharLSTM, CharLSTMConfig
from .run1 import HCLMConfig, LoopHCLM
from .run2 import HCLM, with_choices
from .training import TrainingConfig, build, evaluate, train
from .experiment import Job, keep, load_records, preset, train_all
from .hat import HAT, HATConfig
from .rivals import ByteTransformer, SubwordTransformer
from . import comparison, saving, writing   # presets, saving, and ways of writing of the last three
