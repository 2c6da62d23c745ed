__version__ = "0.1.0"

from .corpus import Alphabet, Corpus, canonical, load_corpus, quotients, synthetic
from .training import CharLSTM, CharLSTMConfig, LanguageModel, TrainingConfig, build, evaluate, keep, load_pretrained, load_records, preset, train
from .run1 import HCLMConfig, LoopHCLM
from .run2 import HCLM, with_choices
from .hat import ByteTransformer, HAT, HATConfig, SubwordTransformer
