"""Instructions: sentences become numbers, policies follow them, checkpoints keep the words."""

import dataclasses
import hashlib
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SENTENCES, observations_of, write_task
from helpers import ROOT
from safetensors.torch import load_file, save_file
from test_contract import same, small_config

import train
from data import WaypointDataset
from data_ar import WindowDataset
from formats.mixture import open_mixture
from harness import checkpoint, finetune
from harness.validation import free_run, looks
from nets.text import (
    MAX_WORDS,
    NO_WORD,
    UNKNOWN,
    ClipReader,
    SentenceReader,
    TextEncoder,
    WordReader,
    installed_mini_lm,
    reader_of,
    reads,
    vocabulary_of,
)
from registry import REGISTRY, look_up
from runtime import UserError

TWO = ("pick up the left bowl", "pick up the right bowl")
VOCABULARY = vocabulary_of(TWO)
SAMPLES = 3  # of each of two tasks


def told(entry, **changes):
    """A small config of a policy that learns the words of TWO."""
    values = {"text": "learned", "vocabulary": VOCABULARY, "rotation": "euler", **changes}
    return small_config(entry, **values)


# -- sentences


def test_words_are_numbered_and_strangers_share_one_number():
    """Case and punctuation do not matter. A paraphrase keeps the words that are known."""
    reader = WordReader(VOCABULARY)
    assert VOCABULARY == "bowl left pick right the up"
    plain = reader("pick up the left bowl")
    assert plain.tolist() == [3, 6, 5, 2, 1] + [NO_WORD] * (MAX_WORDS - 5)
    assert torch.equal(reader("Pick up, the LEFT bowl!"), plain)
    assert reader("grab the left bowl")[:4].tolist() == [UNKNOWN, 5, 2, 1]
    assert reader("")[0] == UNKNOWN and reader("word " * 99).shape == (MAX_WORDS,)


def test_the_unknown_word_is_trained():
    """Words drop out in training, so that the embedding of unknown ones is not what it was at the
    start. In use nothing drops out.
    """
    entry = look_up("para")
    encoder = TextEncoder(told(entry, word_dropout=0.5))
    ids = torch.stack([WordReader(VOCABULARY)(s) for s in TWO])
    draw = lambda shape: torch.rand(shape, generator=torch.Generator().manual_seed(0))
    encoder(ids, draw).sum().backward()
    assert encoder.table.grad[UNKNOWN].abs().max() > 0
    encoder.zero_grad()
    encoder(ids).sum().backward()
    assert encoder.table.grad[UNKNOWN].abs().max() == 0


# -- policies


class Told:
    """Two tasks in one scene: the same frames, once with the recorded waypoints and once with
    others 12 cm aside. Nothing but the instruction tells which."""

    def __init__(self, name, demos, backbone, cache):
        self.name, self.entry, self.backbone = name, look_up(name), backbone
        self.config = told(self.entry)
        self.reader = reader_of(self.config)
        kind = WindowDataset if self.config.has_history else WaypointDataset
        self.demos = demos
        self.dataset = kind(
            demos, self.config, backbone, cache=cache, progress=False, reader=self.reader
        )
        picked = np.linspace(0, len(self.dataset) - 1, SAMPLES).astype(int)
        first = self.dataset.batch(picked)
        first["mask"] = torch.ones_like(first["mask"])
        second = dict(first)
        # in the image of all: towards the middle
        aside = torch.tensor([0.0, 0.12, 0.0]) * -first["target_pos"][..., 1:2].sign()
        second["target_pos"] = first["target_pos"] + aside
        both = {k: torch.cat([first[k], second[k]]) for k in first if k != "features"}
        both["features"] = [torch.cat([m, m]) for m in first["features"]]
        both["instruction"] = torch.stack([self.reader(s) for s in TWO]).repeat_interleave(
            SAMPLES, 0
        )
        self.batch = both

    def policy(self, config=None):
        torch.manual_seed(0)
        policy = self.entry.policy(config or self.config, self.backbone.channels)
        policy.attach(self.backbone, self.reader)
        statistics = self.dataset.statistics()
        policy.fit_statistics({"rotation_basis": None, **statistics})
        return policy

    def fit(self, policy, steps):
        """Train on the batch -> the last loss, without noise."""
        optimizer = torch.optim.AdamW(policy.param_groups(0.0), lr=5e-3)
        for step in range(steps):
            torch.manual_seed(step)
            optimizer.zero_grad()
            policy.train().loss(self.batch)["loss"].backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
        with torch.no_grad():
            return policy.eval().loss(self.batch)["loss"].item()


@pytest.fixture(scope="module", params=list(REGISTRY))
def case(request, synthetic_demos, backbone, tmp_path_factory):
    demos = open_mixture([synthetic_demos]).demos
    return Told(request.param, demos, backbone, tmp_path_factory.mktemp("cache"))


def test_conflicting_targets_are_told_apart_by_the_instruction(case):
    """Where only the sentence tells two tasks apart, training on sentences brings the loss below
    what is possible without, and the answers follow the sentence: swapped, they swap. A policy that
    ignored it would halve its bets, at a loss of ln 2 nats (ACT: half of 12 cm).
    """
    if case.name in ("voxel_ar_rel", "dino_volume_kv"):
        pytest.skip("it hears as the policy does that it is a version of")
    deaf = dataclasses.replace(case.config, text="none")
    policy = case.policy()
    heard, guessed = case.fit(policy, 60), case.fit(case.policy(deaf), 60)
    assert heard < guessed - (0.08 if case.name == "act" else 0.3), (heard, guessed)
    ask = lambda batch: policy.predict(batch)["position"].double()
    swapped = {**case.batch, "instruction": case.batch["instruction"].flip(0)}
    with torch.no_grad():
        answers, others = ask(case.batch), ask(swapped)
    miss = lambda found, true: (found - true).norm(dim=-1).median().item()
    true = case.batch["target_pos"]
    assert miss(answers, true) < 0.04 < 0.08 < miss(others, true)
    assert miss(others, true.roll(SAMPLES, 0)) < 0.04


def test_every_parameter_of_a_told_policy_learns(case):
    """Embeddings and FiLM get gradients too, once they are away from where they begin."""
    policy = case.policy(dataclasses.replace(case.config, word_dropout=0.5))
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.02 * torch.randn_like(p))
    policy.train().loss(case.batch)["loss"].backward()
    for name, p in policy.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name
    grouped = {id(p) for group in policy.param_groups(0.01) for p in group["params"]}
    assert grouped == {id(p) for p in policy.parameters()}
    decayed = {id(p) for p in policy.param_groups(0.01)[0]["params"]}
    assert id(policy.text.table) not in decayed


def test_at_first_film_changes_nothing(case):
    """Scale and shift begin at identity: an untrained PARA answers alike whatever it is told."""
    policy = case.policy().eval()
    if hasattr(policy, "instruction"):
        pytest.skip("it has a token")
    swapped = {**case.batch, "instruction": case.batch["instruction"].flip(0)}
    with torch.no_grad():
        assert same(policy.predict(case.batch), policy.predict(swapped))


def test_in_use_a_policy_hears_what_it_heard_in_training(case):
    """`act` gives the sentence to the network as a batch does, and another sentence answers
    otherwise.
    """
    policy = case.policy().eval()
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    (seen,) = observations_of(case.demos[0], (0,))

    def ask(sentence):
        policy.begin(0)
        seen.instruction = sentence
        return policy.act(seen).position

    heard = {}
    policy.text.register_forward_pre_hook(lambda _, args: heard.update(given=args[0]))
    first = ask(TWO[0])
    assert torch.equal(heard["given"], case.reader(TWO[0])[None])
    np.testing.assert_array_equal(ask("PICK up the left bowl."), first)
    assert np.abs(ask(TWO[1]) - first).max() > 0


def test_a_checkpoint_keeps_the_words(case, tmp_path):
    """Loaded again, the policy knows the words without any dataset and answers the same."""
    policy = case.policy()
    path = tmp_path / "told.safetensors"
    checkpoint.save_policy(path, policy, case.name, {"step": 1})
    loaded, _, _ = checkpoint.load_policy(path, backbone=case.backbone)
    assert torch.equal(loaded.reader(TWO[1]), case.reader(TWO[1]))
    with torch.no_grad():
        assert same(loaded.predict(case.batch), policy.eval().predict(case.batch))


def test_words_of_another_vocabulary_are_not_taken_over(case, tmp_path, capsys):
    """Rows of embeddings lie in alphabetical order: of as many other words each would mean another.
    All else is loaded.
    """
    path = tmp_path / "told.safetensors"
    checkpoint.save_policy(path, case.policy(), case.name, {"step": 1})
    others = " ".join(f"{word}s" for word in VOCABULARY.split())
    for words, taken in ((VOCABULARY, True), (others, False)):
        config = dataclasses.replace(case.config, vocabulary=words)
        policy = case.entry.policy(config, case.backbone.channels)
        policy = policy.attach(case.backbone, reader_of(config))
        report = finetune.init_from(policy, path)
        assert ("text.table" in report["loaded"]) == taken
        assert ("text.table" in report["fresh"]) != taken
        assert "text.layer.0.weight" in report["loaded"]


def test_held_out_checks_run_with_instructions(case):
    """What validation does besides the loss knows that an instruction has no time."""
    policy = case.policy()
    assert np.isfinite(list(looks(policy, case.dataset, "cpu", limit=6).values())).all()
    assert len(free_run(policy, case.demos[0], case.config)["predicted"]) > 1


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "checkpoints").glob("*.json")))
def test_policies_that_are_told_nothing_have_no_new_tensors(name):
    """Committed checkpoints, which are from before instructions, fit bit for bit."""
    path = ROOT / "checkpoints" / f"{name}.json"
    info = json.loads(path.read_text())
    if "config" not in info:
        pytest.skip("no checkpoint's header")
    policy = checkpoint.empty_policy(path, info)
    assert policy.text is None and not reads(policy.config)
    tensors, _ = checkpoint.load_tensors(path.with_suffix(".safetensors"))
    assert checkpoint.with_prefix(tensors, "model.").keys() == policy.state_dict().keys()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "checkpoints").rglob("*.safetensors")), ids=lambda p: p.stem
)
def test_every_committed_checkpoint_loads(path):
    """Those of suites and of the recipe too, by which the figures of the pages were made: a tensor
    that is renamed would leave them behind.
    """
    tensors, info = checkpoint.load_tensors(path)
    policy = checkpoint.empty_policy(path, info)
    stored, own = checkpoint.with_prefix(tensors, "model."), policy.state_dict()
    assert stored.keys() == own.keys()
    assert all(stored[name].shape == own[name].shape for name in own)


# -- data and training


def test_samples_carry_their_own_instruction(suite, backbone, tmp_path):
    """Of frames and of windows, each sample has the sentence of its demonstration."""
    demos = open_mixture([suite]).demos
    config = told(look_up("autoregressive"), vocabulary=vocabulary_of(SENTENCES.values()))
    reader = reader_of(config)
    for kind in (WaypointDataset, WindowDataset):
        dataset = kind(demos, config, backbone, cache=tmp_path, progress=False, reader=reader)
        indices = np.linspace(0, len(dataset) - 1, 20).astype(int)
        found = dataset.batch(indices)["instruction"]
        said = torch.stack([reader(demos[d].instruction) for d in dataset.demo[indices]])
        assert torch.equal(found, said) and len(found.unique(dim=0)) == 3
        assert all(len(rows) for rows in dataset.samples_by_task())


def resolved(paths, **flags):
    """What `train.told` makes of PARA's config for datasets."""
    args = SimpleNamespace(**{"mirror": False, "text_weights": None, **flags})
    config = look_up("para").config(text=flags.get("text", "auto"))
    return train.told(config, open_mixture(paths), args)


def test_instructions_are_learned_where_the_data_have_several(suite):
    """Without a flag: several instructions are learned, one is not. --text none learns none, and
    --text learned one.
    """
    config, reader = resolved([suite])
    assert config.text == "learned" and config.vocabulary == vocabulary_of(SENTENCES.values())
    assert (reader("push it") != UNKNOWN).all()
    alone = [suite / "libero_spatial_0.hdf5"]
    assert resolved(alone)[0].text == "none" == resolved([suite], text="none")[0].text
    assert resolved(alone)[1] is resolved([suite], text="none")[1] is None
    assert resolved(alone, text="learned")[0].vocabulary == vocabulary_of([SENTENCES[0]])


def test_what_cannot_be_told_is_refused(suite, tmp_path):
    """A dataset that does not say what was asked for, sides in the mirror, and frozen text without
    weights: file or flag, and the way out.
    """
    silent = write_task(tmp_path, 2, 3, language="", seed=9)
    with pytest.raises(UserError, match=f"{silent}: does not say what was .*--text none"):
        resolved([suite / "libero_spatial_0.hdf5", silent])
    with pytest.raises(UserError, match="--mirror: 'pick up the blob on the left' would be said"):
        resolved([suite], mirror=True)
    loud = write_task(tmp_path, 10, 3, language="Then stop on the RIGHT.", seed=9)
    with pytest.raises(UserError, match="--mirror: 'Then stop on the RIGHT.' would be said"):
        resolved([loud, suite / "libero_spatial_0.hdf5"], mirror=True)
    with pytest.raises(UserError, match="--text clip: the weights .*--text_weights"):
        resolved([suite], text="clip")


# -- frozen text


@pytest.fixture(scope="module")
def text_weights(tmp_path_factory):
    """A folder as open_clip has it, of a tiny model with random weights."""
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    model = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 16,
            "heads": 2,
            "layers": 1,
        },
    }
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model, "preprocess_cfg": {}})
    )
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**model).state_dict(), folder / "open_clip_model.safetensors")
    return folder


def test_frozen_features_of_sentences_are_computed_once(text_weights):
    """A sentence has the same unit vector each time, another sentence another, and the second time
    the network is not asked.
    """
    reader = ClipReader(text_weights)
    first = reader(TWO[0])
    assert first.shape == (16,) and first.norm() == pytest.approx(1, abs=1e-5)
    assert not torch.allclose(reader(TWO[1]), first)
    reader.model = None
    assert torch.equal(reader(TWO[0]), first)


def test_frozen_text_is_trained_on_and_its_weights_are_asked_for(
    suite, text_weights, tmp_path, backbone
):
    """--text clip trains with a local folder alone. A checkpoint refuses others."""
    config, reader = resolved([suite], text="clip", text_weights=text_weights)
    assert (config.text, config.text_features) == ("clip", 16)
    config = small_config(look_up("para"), text="clip", text_features=16)
    demos = open_mixture([suite]).demos[2:6]
    dataset = WaypointDataset(demos, config, backbone, 8, tmp_path, False, reader)
    torch.manual_seed(0)
    policy = look_up("para").policy(config, backbone.channels).attach(backbone, reader)
    policy.fit_statistics(dataset.statistics())
    assert torch.isfinite(policy.loss(dataset.batch(range(4)))["loss"])
    path = tmp_path / "clip.safetensors"
    checkpoint.save_policy(path, policy, "para", {"step": 1})
    load = lambda weights: checkpoint.load_policy(path, backbone=backbone, text_weights=weights)
    assert torch.equal(load(text_weights)[0].reader(TWO[0]), reader(TWO[0]))
    with pytest.raises(UserError, match="--text_weights"):
        load(None)
    other = shutil.copytree(text_weights, tmp_path / "other")
    tensors = load_file(other / "open_clip_model.safetensors")
    tensors["text_projection"] += 1
    save_file(tensors, other / "open_clip_model.safetensors")
    with pytest.raises(UserError, match="was trained on the sentences' features open_clip-16-"):
        load(other)


def test_the_sentence_model_is_the_published_one():
    """Installed by the requirements. Its weights are those of the hub, by their hash; a sentence is
    nearer to one of the same meaning in other words than to another task's.
    """
    folder = installed_mini_lm()
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert digest == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    reader = SentenceReader()
    assert reader.features == 384 and reader.identity.startswith("sentence_transformers-384-")
    said, meant, other = (
        reader(sentence)
        for sentence in (
            "put the wine bottle on top of the cabinet",
            "set the bottle of wine onto the cupboard",
            "turn on the stove",
        )
    )
    assert said.norm() == pytest.approx(1, abs=1e-5)
    assert said @ meant > 0.7 > 0.5 > said @ other


def test_the_sentence_model_is_trained_with(suite, tmp_path, backbone):
    """--text sentence needs no folder. The checkpoint goes on without one, and another model's
    features are refused.
    """
    config, reader = resolved([suite], text="sentence")
    assert (config.text, config.text_features) == ("sentence", 384)
    config = small_config(look_up("para"), text="sentence", text_features=384)
    policy = look_up("para").policy(config, backbone.channels).attach(backbone, reader)
    path = tmp_path / "sentence.safetensors"
    checkpoint.save_policy(path, policy, "para", {"step": 1})
    loaded = checkpoint.load_policy(path, backbone=backbone)[0]
    assert torch.equal(loaded.reader(TWO[0]), reader(TWO[0]))
    # what a policy hears are the vectors, apart for two sentences and alike for one
    heard = [loaded.text(loaded.instructed(words)["instruction"]) for words in (*TWO[:2], TWO[0])]
    assert torch.equal(heard[0], heard[2]) and not torch.allclose(heard[0], heard[1], atol=1e-2)
    with pytest.raises(UserError, match="--text_weights .*modules.json is not there"):
        checkpoint.load_policy(path, backbone=backbone, text_weights=tmp_path)
    (tmp_path / "modules.json").write_text("{}")
    with pytest.raises(UserError, match="no model that sentence-transformers can load"):
        SentenceReader(tmp_path)


def test_frozen_features_drop_out_in_training_alone():
    """As words do: now and then one counts for nothing."""
    encoder = TextEncoder(small_config(look_up("para"), text="sentence", text_features=8))
    features = torch.randn(2, 8)
    assert torch.equal(encoder(features), encoder(features))
    none = encoder(features, lambda shape: torch.ones(shape))
    assert torch.equal(none, encoder(features))
    all_gone = encoder(features, lambda shape: torch.zeros(shape))
    assert torch.equal(all_gone[0], all_gone[1]) and not torch.equal(all_gone, none)


def test_a_folder_without_a_text_model_is_refused(tmp_path):
    """A missing config, and one that is no model: file, flag and remedy."""
    with pytest.raises(UserError, match="open_clip_config.json is not there.*--text learned"):
        ClipReader(tmp_path)
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(UserError, match="--text_weights .*no model that open_clip can load"):
        ClipReader(tmp_path)
