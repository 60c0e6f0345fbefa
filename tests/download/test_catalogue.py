"""Meta's files: names, addresses, and sizes that follow from the shapes."""

from __future__ import annotations

import pytest

from metaseq_api.core.config import OPT_SHAPES
from metaseq_api.download import catalogue
from metaseq_api.download.catalogue import RELEASES, TOKENIZER, TOKENIZER_MD5, files, part_params
from metaseq_api.errors import SettingsError


def weights(model: str, edition: str | None = None, url: str | None = None) -> list[catalogue.File]:
    return [f for f in files(model, edition=edition, url=url) if f.name not in TOKENIZER_MD5]


@pytest.mark.parametrize(
    ("model", "num_parts", "numel"),
    [
        # lengths of the flattened parts, as users saw them
        ("opt-125m", 2, 63_435_264),
        ("opt-1.3b", 2, 660_127_744),
        ("opt-2.7b", 4, 667_207_680),
        ("opt-6.7b", 2, 3_333_832_704),
        ("opt-13b", 2, 6_432_604_160),
        ("opt-30b", 2, 14_995_656_704),
        ("opt-66b", 8, 8_234_606_592),
        ("opt-175b", 8, 21_853_814_784),
    ],
)
def test_a_part_has_as_many_parameters_as_its_flat_vectors(model: str, num_parts: int, numel: int) -> None:
    assert part_params(OPT_SHAPES[model], num_parts) == numel
    assert part_params(OPT_SHAPES[model], 1) == OPT_SHAPES[model].num_params


@pytest.mark.parametrize(
    ("model", "edition", "num_files", "first"),
    [
        ("opt-125m", None, 1, "opt/v1_20230405/125m/reshard-model_part-0.pt"),
        ("opt-125m", "2022", 2, "opt/v1_20220502/125m/reshard-model_part-0.pt"),
        ("opt-350m", None, 1, "opt/v1_20220502/350m/reshard.pt"),
        ("OPT-1.3B", "2023", 1, "opt/v1_20230405/1.3b/reshard-model_part-0.pt"),
        ("opt-2.7b", "2022", 4, "opt/v1_20220502/2.7b/reshard-model_part-0.pt"),
        ("opt-6.7b", None, 1, "opt/v1_20230405/6.7b/reshard-model_part-0.pt"),
        ("opt-13b", None, 2, "opt/v1_20230405/13b/reshard-model_part-0.pt"),
        ("opt-30b", None, 4, "opt/v1_20230405/30b/reshard-model_part-0.pt"),
        ("opt-66b", None, 8, "opt/v1_20230405/66b/reshard-model_part-0.pt"),
        ("opt-66b", "2022", 8, "opt/v1_20221026/66b/reshard-model_part-0.pt"),
        (
            "opt-iml-30b",
            None,
            2,
            "optiml/aws.v7.prop10.30b.eps_4096.docsep_2.mu4000.wu60.bsz8.clip1.0.fp32adam.rs1234.lr5e-05.pat_8000.ngpu64"
            "/mp2/checkpoint_1_4000.pt-model_part-0.pt",
        ),
        (
            "opt-iml-max-30b",
            None,
            2,
            "optiml/aws.v7.2000.prop10.30b.eps_4096.docsep_2.mu6000.wu60.bsz8.clip1.0.fp32adam.rs1234.lr5e-05.pat_8000"
            ".ngpu64/mp2/checkpoint_1_6000.pt-model_part-0.pt",
        ),
    ],
)
def test_each_public_model_has_its_files(model: str, edition: str | None, num_files: int, first: str) -> None:
    found = weights(model, edition)
    assert len(found) == num_files
    assert found[0].url == f"https://dl.fbaipublicfiles.com/{first}"
    assert all(f.url.endswith(f"/{f.name}") and f.weights > 10**8 for f in found)


def test_the_tokenizer_comes_with_every_model_from_metas_repository() -> None:
    for model in RELEASES:
        found = files(model, url="https://mirror/opt")
        assert {f.name: f.md5 for f in found if f.md5} == TOKENIZER_MD5
        assert {f.url for f in found if f.md5} == {f"{TOKENIZER}/{name}" for name in TOKENIZER_MD5}


def test_the_175b_model_is_992_files_of_a_pre_signed_address() -> None:
    found = weights("opt-175b", url="https://host.example/175b/checkpoint_last_20220503/stubbed.pt?Key=a/b&Sign=~x__")
    assert len({f.url for f in found}) == 992
    assert (
        found[-1].url
        == "https://host.example/175b/checkpoint_last_20220503/checkpoint_last-model_part-7-shard123.pt?Key=a/b&Sign=~x__"
    )
    assert found[0].weights == 2 * 21_853_814_784 // 124


def test_a_star_in_a_sent_address_stands_for_the_part() -> None:
    found = weights("opt-iml-max-175b", url="https://host.example/max/checkpoint_1_12000-model_part-*.pt?&Sign=x")
    assert len(found) == 16
    assert found[15].url == "https://host.example/max/checkpoint_1_12000-model_part-15.pt?&Sign=x"


@pytest.mark.parametrize("base", ["http://mirror:8080/opt/125m", "http://mirror:8080/opt/125m/"])
def test_a_mirror_is_a_folder(base: str) -> None:
    assert weights("opt-125m", url=base)[0].url == "http://mirror:8080/opt/125m/reshard-model_part-0.pt"


@pytest.mark.parametrize("model", ["opt-175b", "opt-iml-175b", "opt-iml-max-175b"])
def test_what_is_not_public_wants_the_address_that_meta_sends(model: str) -> None:
    with pytest.raises(SettingsError, match=f"{model} is not public: .*--url 'ADDRESS', in quotes"):
        files(model)


@pytest.mark.parametrize(
    "url",
    ["", "mirror/opt", "ftp://mirror/opt", "file:///opt", "http://", "http://[x/", "http://h:99999/a", "http://h/a b"],
)
def test_what_is_no_http_address_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match="not one of HTTP"):
        files("opt-175b", url=url or " ")


def test_an_address_with_a_password_is_refused_and_not_shown() -> None:
    with pytest.raises(SettingsError, match="without a user or password") as refusal:
        files("opt-175b", url="https://me:secret@mirror/opt?key=secret")
    assert "secret" not in str(refusal.value)


def test_an_unknown_model_or_edition_is_refused_with_those_there_are() -> None:
    with pytest.raises(SettingsError, match=r"did you mean opt-1.3b\? there are opt-125m, "):
        files("opt-1.3")
    with pytest.raises(SettingsError, match="opt-iml-30b has one edition, not 2022"):
        files("opt-iml-30b", edition="2022")
