"""The names that `from hclm_repro import ...` finds."""

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
from .frontier import DynamicEvaluation
from . import comparison, saving, sharing, writing   # presets, saving, cards, and ways of writing of the last three
