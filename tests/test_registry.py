"""The registry: duplicates raise, unknown names list what there is, entries load when asked for."""

from __future__ import annotations

import sys

import pytest

from lowbit.train.registry import Registry


def test_register_and_get():
    registry: Registry[type] = Registry("shape")

    @registry.register("circle")
    class Circle:
        pass

    assert registry.get("circle") is Circle
    assert list(registry) == ["circle"]
    assert "circle" in registry
    assert len(registry) == 1


def test_duplicate_raises():
    registry: Registry[object] = Registry("shape")
    registry.register("circle")(object())
    with pytest.raises(ValueError, match="already registered"):
        registry.register("circle")(object())


def test_unknown_lists_the_names():
    registry: Registry[object] = Registry("shape")
    registry.register("circle")(object())
    registry.register("square")(object())
    with pytest.raises(ValueError, match=r"unknown shape 'circl': did you mean 'circle'\? Known: circle, square"):
        registry.get("circl")


def test_lazy_entries_are_known_before_they_are_loaded(tmp_path, monkeypatch):
    (tmp_path / "lazy_shapes.py").write_text("import shape_registry\nshape_registry.r.register('oval')('an oval')\n")
    (tmp_path / "shape_registry.py").write_text(
        "from lowbit.train.registry import Registry\nr = Registry('shape', {'oval': 'lazy_shapes', 'ghost': 'json'})\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import shape_registry

    assert list(shape_registry.r) == ["ghost", "oval"]
    assert "lazy_shapes" not in sys.modules
    assert shape_registry.r.get("oval") == "an oval"
    with pytest.raises(RuntimeError, match="json does not register the shape 'ghost'"):
        shape_registry.r.get("ghost")
