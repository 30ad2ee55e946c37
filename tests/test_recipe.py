"""Recipes: what --set changes; every mistake is one clear error. The recipes that ship: test_recipes.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowbit.train.recipe import RecipeError, differing_keys, load_recipe

FOLDER = Path(__file__).parents[1] / "recipes"
DEMO = FOLDER / "fashion-mnist" / "bireal14-w1a1-slb-demo.yaml"


def test_set():
    recipe = load_recipe(DEMO, ["train.epochs=3", "train.lr=1e-2", "data.augment={crop: 2}", "name=other"])
    assert (recipe.train.epochs, recipe.train.lr, recipe.data.augment.crop, recipe.name) == (3, 0.01, 2, "other")
    assert differing_keys(recipe, load_recipe(DEMO)) == ["data.augment.crop", "name", "train.epochs", "train.lr"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", r"unknown key 'train\.epoch': did you mean 'epochs'\? Known: accumulate, batch_size"),
        ("sede=1", r"unknown key 'sede': did you mean 'seed'\?"),
        ("data.augment.crp=1", r"unknown key 'data\.augment\.crp': did you mean 'crop'\?"),
        ("model.widht=8", r"unknown key 'model\.widht': did you mean 'width'\?"),
        ("data.rot=x", r"unknown key 'data\.rot': did you mean 'root'\?"),
        ("model.name=resnet2", r"unknown model 'resnet2': did you mean 'resnet20'\?"),
        ("quantize.method=slbb", r"'slbb': did you mean 'slb'\?"),
        ("quantize.activation=dorfa", r"'dorfa': did you mean 'dorefa'\?"),
        ("data.name=fashion_mnits", r"'fashion_mnits': did you mean 'fashion_mnist'\?"),
        ("task=clasify", r"unknown task 'clasify': did you mean 'classify'\?"),
        ("quantize.weight_bits=3", r"quantize: the method 'slb' has 1, 2, 4 weight bits, not 3"),
        ("quantize.weight_bits=0", r"quantize\.weight_bits: Input should be greater than or equal to 1, got 0"),
        ("quantize.activation_bits=9", r"quantize: the activation 'dorefa' has .* activation bits, not 9"),
        ("quantize={method: adabin, activation_bits: 32}", r"quantize: AdaBin weights have an offset and need inputs"),
        ("quantize.options={spred: 1}", r"spred"),
        ("train.epochs=many", r"train\.epochs: Input should be a valid integer.*got 'many'"),
        ("data.train_images=many", r"data\.train_images: Input should be a valid integer.*got 'many'"),
        ("model.width=wide", r"model\.width: Input should be a valid integer.*got 'wide'"),
        ("train.lr=0", r"train\.lr: Input should be greater than 0, got 0"),
        ("train.lr_schedule=step", r"needs milestones"),
        ("train.milestones=[3]", r"belong to lr_schedule: step"),
        ("train.strategy=fsdp", r"train\.strategy: fsdp shards .* train\.accumulate$"),
        ("train.warmup=100", r"warmup of 100\.0 epochs in a run of"),
        ("schedule.start=0.95", r"start 0\.95 must come before end 0\.9"),
    ],
)
def test_one_error_with_file_and_key(override, message):
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(DEMO, [override])
    assert str(DEMO) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs", "write key.subkey=value"),
        ("train.lr.x=1", "'lr' is not a section"),
        ("train.epochs=[1", "not YAML"),
    ],
)
def test_bad_set(override, message):
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(DEMO, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not YAML.*line"),
        ("- 1", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        ("name: x\nmodel: {name: resnet20}", "key 'data' is missing"),
        ("name: x\nrecipe: y.yaml", "is a table, not a recipe; `lowbit compare` runs it"),
        ("name: x\nname: y\n", "key 'name' is written twice, line 2"),
        ("name: !!python/object:os.system x", "not YAML"),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(RecipeError, match="can't read this recipe"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="can't read this recipe"):
        load_recipe(tmp_path)
