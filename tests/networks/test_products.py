"""Which matrices are those of products, and along which axis their outputs lie."""

from builders import tiny_recipe, tiny_schema
from torch import nn

from ensemble_kit.networks.products import output_axes
from ensemble_kit.networks.sub_model import SubModel


def test_outputs_are_the_rows_of_pytorchs_matrices_and_the_columns_of_the_kits():
    def product_axes(pooling, **parts):
        return output_axes(SubModel(tiny_recipe(pooling=pooling, **parts), tiny_schema()))

    vlad = product_axes("netvlad")
    assert vlad == {
        "poolings.stream_rgb.assignment.weight": 1,
        "poolings.stream_audio.assignment.weight": 1,
        "hidden.weight": 1,
        "gating.weight": 1,
        "head.gates.weight": 0,
        "head.experts.weight": 0,
    }
    assert "poolings.stream_rgb.covariances" not in product_axes("net_fv")
    cells = product_axes("bigru", gating=None)
    names = [name.rpartition(".cells.")[2] for name, axis in cells.items() if axis == 0]
    assert {"weight_ih_l0", "weight_hh_l1_reverse"} < set(names)
    assert output_axes(nn.Linear(3, 2)) == {"weight": 0}
