__version__ = "0.1.0"

import os, sys
if 'torch' not in sys.modules: os.environ.setdefault('OMP_WAIT_POLICY', 'passive')   # read when torch is loaded

from .text import Alphabet, canonical, quotients
from .corpus import Corpus, load_corpus, synthetic
from .model import LanguageModel, load_pretrained
from .recurrence import CharLSTM, CharLSTMConfig
from .run1 import HCLMConfig, LoopHCLM
from .run2 import HCLM, with_choices
from .training import TrainingConfig, build, evaluate, train
from .experiment import Job, keep, load_records, preset, train_all
