"""Class embeddings that are kept on disk: bit for bit those of the model, or embedded anew."""

import os
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from iimm_callbacks import Task
from iimm_callbacks.models.encoders import find_encoder
from iimm_callbacks.probing import texts
from iimm_callbacks.probing.probe import Probe


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(texts.FOLDER, str(tmp_path / "texts"))
    monkeypatch.setattr(texts, "WORTH", 500)
    monkeypatch.setattr("iimm_callbacks.probing.embedding.WORTH", 500)
    return tmp_path / "texts"


@pytest.fixture
def large():
    """300 classes and two templates: three batches."""
    pairs = [(Image.new("RGB", (48, 48), (i, 0, 0)), i) for i in range(300)]
    names = [f"{i // 26} {chr(97 + i % 26)}" for i in range(300)]
    return Task("large", pairs, templates=["a {}", "the {}"], class_names=names, probe_size=8)


@pytest.fixture
def look(large, processor):
    """A look at a model: class embeddings, and how many prompts were embedded for them."""

    def take(model, step=0, **settings):
        found, counts = [], []
        probe = Probe(large, processor=processor, progress=False, **settings)
        probe.prepare(model)
        show = probe._show
        probe._show = lambda *a: found.append(show(*a)) or found[0]
        hook = model.text_model.register_forward_hook(
            lambda module, inputs, output: counts.append(len(output[0]))
        )
        seen = probe.look(model, step)
        hook.remove()
        return found[0][0], sum(counts), seen.measurement

    return take


def test_a_second_run_embeds_one_batch_and_has_the_same_numbers(folder, look, tiny_clip):
    fresh, embedded, numbers = look(tiny_clip())
    again, again_embedded, again_numbers = look(tiny_clip())
    assert (embedded, again_embedded) == (600, 256)
    assert torch.equal(fresh, again)
    assert numbers == again_numbers
    assert len(list(folder.iterdir())) == 1


def is_fast(processor):
    return hasattr(processor.tokenizer, "backend_tokenizer")


def test_a_second_run_tokenizes_one_template_and_one_batch(folder, look, tiny_clip, processor):
    asked = []
    tokenizer = type(processor.tokenizer)
    real = tokenizer.__call__
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            tokenizer,
            "__call__",
            lambda self, t, **more: asked.append(len(t)) or real(self, t, **more),
        )
        fresh, *_ = look(tiny_clip())
        first = sum(asked)
        asked.clear()
        assert torch.equal(look(tiny_clip())[0], fresh)
    again = 256 if is_fast(processor) else 600
    assert (first, sum(asked)) == (300 + 600 + 1, 300 + again + 1)  # 1: what a pass is tried with


def test_another_tokenizer_is_another_file(folder, look, tiny_clip, processor):
    model = tiny_clip()
    look(model)
    truncation = processor.tokenizer.model_max_length
    try:
        processor.tokenizer.model_max_length = truncation - 1
        look(model)
    finally:
        processor.tokenizer.model_max_length = truncation
    # Of a slow tokenizer only the tokens are told, and these short prompts have the same.
    assert len(list(folder.iterdir())) == (2 if is_fast(processor) else 1)


def test_a_tokenizer_of_ones_own_is_told_by_its_tokens(folder, look, tiny_clip, processor):
    class Own(type(processor.tokenizer)):
        turned = False

        def __call__(self, prompts, **settings):
            found = super().__call__(prompts, **settings)
            if self.turned:  # in the last batch only, which is not embedded anew
                last = [i for i, prompt in enumerate(prompts) if prompt.endswith("11 n")]
                found["input_ids"][last, 1] += 1
            return found

    kind = type(processor.tokenizer)
    processor.tokenizer.__class__ = Own
    try:
        look(tiny_clip())
        Own.turned = True
        assert look(tiny_clip())[1] == 600
    finally:
        processor.tokenizer.__class__ = kind
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("n_classes", [1, 127, 128, 300])
def test_prompts_are_listed_in_pieces_as_in_one(n_classes, processor, tiny_clip):
    names = [f"it's {i}" for i in range(max(n_classes, 2))]
    task = Task("t", [(None, 0), (None, 1)], class_names=names, templates=["a {}", 'the "{}"'])
    encoder = find_encoder(tiny_clip(), processor)
    prompts = texts.Prompts(names[:n_classes], task, encoder)
    assert b"".join(prompts.listed()) == repr(task.fill(names[:n_classes])).encode()
    assert len(prompts) == 2 * n_classes == sum(len(b["input_ids"]) for b in prompts)


@pytest.mark.parametrize(("in_memory", "times"), [(600, 1), (599, 2)])
def test_very_many_prompts_are_tokenized_at_every_look_others_once(
    folder, large, processor, tiny_clip, monkeypatch, in_memory, times
):
    monkeypatch.setattr(texts, "_IN_MEMORY", in_memory)
    prompts = texts.Prompts(large.class_names, large, find_encoder(tiny_clip(), processor))
    asked = []
    tokenize = prompts.tokenize
    monkeypatch.setattr(prompts, "tokenize", lambda some: asked.extend(some) or tokenize(some))
    for _ in range(2):
        assert sum(len(batch["input_ids"]) for batch in prompts) == 600
    assert len(asked) == 600 * times


def test_classes_that_differ_in_one_template_only_are_told_apart():
    def tokenize(prompts):  # those of one template in lower case
        read = [p.lower() if p[0] == "x" else p for p in prompts]
        return {"input_ids": torch.tensor([[ord(letter) for letter in p] for p in read])}

    encoder = SimpleNamespace(tokenize=tokenize)
    for templates, fails in ((["x {}", "y {}"], False), (["x {}"], True)):
        names = ["A", "b", "a"]
        task = Task("t", [(None, 0), (None, 1)], class_names=names, templates=templates)
        prompts = texts.Prompts(names, task, encoder)
        with pytest.raises(ValueError, match="'x A', 'x a'") if fails else nullcontext():
            texts.tell_one_text(task, prompts)


def change_a_token(model):
    model.text_model.embeddings.token_embedding.weight.data[-1, 0] += 1e-3


def change_by_a_hook(model):
    model.text_projection.register_forward_hook(lambda module, inputs, output: 2 * output)


def change_the_way(model):
    model.text_model.encoder.layers[0].mlp.activation_fn = nn.ReLU()


@pytest.mark.parametrize("change", [change_a_token, change_by_a_hook, change_the_way])
def test_a_model_that_is_another_in_any_way_is_embedded_anew(folder, look, tiny_clip, change):
    look(tiny_clip())
    model = tiny_clip()
    change(model)
    kept, embedded, _ = look(model)
    assert embedded == 600
    os.environ[texts.FOLDER] = "off"  # the fixture puts it back
    assert torch.equal(kept, look(model)[0])


def test_a_torn_file_is_embedded_anew_and_mended(folder, look, tiny_clip):
    fresh, *_ = look(tiny_clip())
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    for torn in (whole[: len(whole) // 2], b"", b"{}" * 40):
        path.write_bytes(torn)
        again, embedded, _ = look(tiny_clip())
        assert embedded == 600
        assert torch.equal(fresh, again)
    assert path.read_bytes() == whole


def test_nothing_is_kept_of_a_model_in_training_of_few_texts_or_where_it_is_off(
    folder, look, tiny_clip, monkeypatch
):
    look(tiny_clip(), step=3)
    monkeypatch.setattr("iimm_callbacks.probing.embedding.WORTH", 601)
    look(tiny_clip())
    monkeypatch.setattr("iimm_callbacks.probing.embedding.WORTH", 500)
    monkeypatch.setenv(texts.FOLDER, "off")
    assert look(tiny_clip())[1] == look(tiny_clip())[1] == 600
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_harms_nothing(
    tmp_path, monkeypatch, look, folder, tiny_clip
):
    (tmp_path / "file").touch()
    monkeypatch.setenv(texts.FOLDER, str(tmp_path / "file" / "below"))
    assert look(tiny_clip())[1] == look(tiny_clip())[1] == 600


def test_the_longest_unused_files_go_where_there_are_too_many(folder, tiny_clip, monkeypatch):
    kept = texts.KeptTexts(tiny_clip(), None)
    monkeypatch.setattr(texts, "ROOM", 3000)
    names = []
    for number in range(4):
        path = kept.path([{"input_ids": torch.tensor([[number]])}], 1)
        kept.write(path, torch.zeros(1, 8), torch.zeros(25, 8) + number)  # some 1,000 bytes
        os.utime(path, (number, number))
        names.append(path)
        if number == 2:
            kept.read(names[0], torch.zeros(1, 8))  # used just now
    assert [path.exists() for path in names] == [True, False, True, True]
    assert torch.equal(kept.read(names[3], torch.zeros(1, 8)), torch.full((25, 8), 3.0))


def test_quantised_weights_are_not_told_apart_so_nothing_is_kept(folder, tiny_clip):
    class Codes(nn.Parameter):
        pass

    model = tiny_clip()
    assert texts.KeptTexts(model, None).path([], 1) is not None
    model.text_projection.weight = Codes(model.text_projection.weight.data)
    assert texts.KeptTexts(model, None).path([], 1) is None
