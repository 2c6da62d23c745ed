__version__ = "0.1.0"

from .text import Alphabet, canonical, quotients
from .corpus import Corpus, load_corpus, synthetic
from .model import LanguageModel, load_pretrained
from .run1 import HCLMConfig, LoopHCLM
from .recurrence import CharLSTM, CharLSTMConfig
from .run2 import HCLM, with_choices
