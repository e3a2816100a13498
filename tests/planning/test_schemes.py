"""Bytes and forms that the plan computes against those of the exporter and the quantizer."""


import pytest

from tests.conftest import GOLDENS, NANO
from vl2.errors import VL2Error
from vl2.planning.models import planned_model
from vl2.planning.schemes import EXPERT_FORMS, Choice, form_of_checkpoint, form_of_choice, storage_of
from vl2.quantization import Form


@pytest.mark.parametrize("scheme", ["fp32", "fp16"])
def test_bytes_by_module_are_those_of_an_export(mini_folder, scheme: str) -> None:
    from vl2.export.bundle import ExportOptions
    from vl2.export.plan import plan_export

    model = planned_model(str(mini_folder))
    storage = storage_of(model.tensors, form_of_choice(Choice(scheme), model.config), 4 if scheme == "fp32" else 2)
    exported = plan_export(mini_folder, ExportOptions(scheme))
    assert storage.modules == {name: facts.size_bytes for name, facts in exported.modules.items()}
    assert storage.vision_bytes - exported.graphs["vision"] == 2 * 4 * model.config.language_config.hidden_size
    assert not storage.quantized and (storage.widened_bytes > 0) == (scheme == "fp16")


@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_bytes_of_a_quantized_checkpoint_are_those_of_its_export(quantized_of, recipe: str) -> None:
    from vl2.export.bundle import ExportOptions
    from vl2.export.plan import plan_export

    folder = quantized_of(NANO, recipe)
    model, exported = planned_model(str(folder)), plan_export(folder, ExportOptions(None, lowering="ort"))
    sizes = {name: facts.size_bytes for name, facts in exported.modules.items()}
    assert model.storage.modules == sizes
    all_int8 = Choice(recipe, "int8", "int8", "int8")
    planned = storage_of(model.tensors, form_of_choice(all_int8, model.config), 2)
    assert planned.modules == sizes and planned.read == model.storage.read


@pytest.mark.parametrize("recipe", ["int8", "int4", None])
@pytest.mark.parametrize("lowering", ["cpu", "portable"])
def test_bytes_under_every_lowering_are_those_of_an_export(quantized_of, recipe: str | None, lowering: str) -> None:
    from vl2.export.bundle import ExportOptions
    from vl2.export.plan import plan_export

    folder = quantized_of(NANO, recipe) if recipe else NANO
    model, exported = planned_model(str(folder)), plan_export(folder, ExportOptions(None, lowering=lowering))
    form_of = form_of_checkpoint(model.config) if recipe else form_of_choice(Choice("fp16"), model.config)
    storage = storage_of(model.tensors, form_of, 2, lowering)
    assert storage.modules == {name: facts.size_bytes for name, facts in exported.modules.items()}
    assert storage.lowering == lowering and storage.quantized == (recipe is not None)


@pytest.mark.parametrize("lowering, number, told", [("ort", 2, "for quantized"), ("cpu", 4, "not float32"),
                                                    ("gpu", 2, "no lowering")])
def test_a_lowering_that_does_not_hold_the_weights_is_refused(lowering: str, number: int, told: str) -> None:
    model = planned_model(str(NANO))
    with pytest.raises(VL2Error, match=told):
        storage_of(model.tensors, lambda tensor: None, number, lowering)


@pytest.mark.parametrize("name", ["tiny", str(GOLDENS / "small-mini"), str(NANO)], ids=["tiny", "small-mini", "nano"])
@pytest.mark.parametrize("scheme", EXPERT_FORMS)
def test_forms_are_those_of_the_built_in_recipes(name: str, scheme: str) -> None:
    from vl2.quant.recipe import OuterParts, assign_schemes, builtin_recipe

    model = planned_model(name)
    outer = ("int8", "fp16", "int8")
    try:
        assigned = assign_schemes(builtin_recipe(scheme, model.config, OuterParts(*outer)), model.config)
    except VL2Error:
        with pytest.raises(VL2Error, match="which no group"):
            storage_of(model.tensors, form_of_choice(Choice(scheme, *outer), model.config), 2)
        return
    form_of = form_of_choice(Choice(scheme, *outer), model.config)
    for tensor in model.tensors:
        if tensor.is_matrix:
            found = assigned[tensor.name.removesuffix(".weight")]
            # one scale a row is one group over all inputs
            columns = tensor.shape[1]
            expected = None if found is None else Form(found.bits, found.group_size or columns)
            form = form_of(tensor)
            assert (form and Form(form.bits, form.group_size or columns)) == expected, tensor.name


def test_a_scheme_that_does_not_exist_is_refused() -> None:
    with pytest.raises(VL2Error, match="there is no scheme `int3`"):
        Choice("int3")


def test_the_full_size_tiny_has_the_sizes_of_docs_results() -> None:
    model = planned_model("tiny")
    # "Export of the full-size Tiny", "Quantized full-size Tiny"; the tables there count graphs and tokenizer too
    for scheme, measured in {"fp32": 13.43e9, "fp16": 6.72e9, "int8": 3.42e9, "int4": 2.32e9}.items():
        form_of = form_of_choice(Choice(scheme, "int8", "int8", "int8"), model.config)
        planned = storage_of(model.tensors, form_of, 4 if scheme == "fp32" else 2).total_bytes
        assert planned == pytest.approx(measured, rel=0.003)
