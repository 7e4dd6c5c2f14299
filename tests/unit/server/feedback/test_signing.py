import base64
import math
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.feedback import (
    BadPredictionIdError,
    FeedbackSetupError,
    PredictionSigner,
    answer_digest,
    claim_unverified,
)
from server.feedback.claim import packed
from server.feedback.signing import MIN_SECRET_CHARS, load_secrets
from tests.support.feedback import make_claim, make_reproduction

OLD, NEW, OTHER = "o" * 40, "n" * 40, "x" * 40
CLAIM = make_claim()
CLAIM_2 = make_claim(reproduction=make_reproduction())
ID_OF_VERSION_1 = (
    ".eJw1i1EOwiAQBe-y32vzKGmiZ2kaQ1da11IggPcXE52_l3kzU0tZpRKT3W4OMGYcre1z1RA07sQY7B8mJ-Jz67poP"
    "S4YMH0PmNiAwXSm2PxdXAmJ2Fzxo3erPPy2P_V1hDOmTNzK2y8fnaAkMQ.JDrtgUcILiEsJdXIp8WmB1MlkMtz8DG5q"
    "_F5b8WccRM"
)
DIGEST_OF_VERSION_1 = "018294031d4988ff49365af4279e1ce49aecfa9bc98cad53f3ede66ccd6e7713"
TEXTS = st.text(max_size=40)


@given(label=TEXTS, policy=st.none() | TEXTS, confidence=st.floats(0, 1), seed=st.integers(0))
def test_an_id_gives_back_what_was_signed(
    label: str, policy: str | None, confidence: float, seed: int
) -> None:
    claim = make_claim(label=label, policy=policy, confidence=round(confidence, 9), seed=seed)
    signer = PredictionSigner([NEW])
    assert signer.verify(signer.sign(claim)) == claim


def test_confidence_keeps_nine_decimal_places() -> None:
    signer = PredictionSigner([NEW])
    claim = make_claim(confidence=1 / 3)
    assert signer.verify(signer.sign(claim)).confidence == 0.333333333
    assert signer.verify(signer.sign(claim)).digest == claim.digest


def test_an_id_is_short_and_safe_in_a_url() -> None:
    prediction_id = PredictionSigner([NEW]).sign(CLAIM)
    assert len(prediction_id) <= 260
    assert set(prediction_id) <= set(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_."
    )


def test_no_character_of_an_id_can_be_changed_to_mean_something_else() -> None:
    signer = PredictionSigner([NEW])
    prediction_id = signer.sign(CLAIM)
    for index, character in enumerate(prediction_id):
        changed = "A" if character != "A" else "B"
        forged = prediction_id[:index] + changed + prediction_id[index + 1 :]
        try:
            found = signer.verify(forged)
        except BadPredictionIdError:
            continue
        # base64 leaves two bits of the last character unused: another spelling, the same claim
        assert index == len(prediction_id) - 1
        assert found.digest == CLAIM.digest


@pytest.mark.parametrize(
    "text", ["", ".", "abc", "abc.def", "p_1", "é" * 20, "\ud800", "a.b.c", "eyJ9." * 9]
)
def test_what_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(BadPredictionIdError):
        PredictionSigner([NEW]).verify(text)


def test_an_id_of_another_secret_is_refused() -> None:
    prediction_id = PredictionSigner([OTHER]).sign(CLAIM)
    with pytest.raises(BadPredictionIdError):
        PredictionSigner([NEW, OLD]).verify(prediction_id)


def test_a_signed_value_that_is_no_claim_is_refused() -> None:
    signer = PredictionSigner([NEW])
    for value in ({"adapter": "topics"}, ["topics"], "topics", None):
        for serializer in signer._serializers.values():
            forged = serializer.dumps(value)
            with pytest.raises(BadPredictionIdError):
                signer.verify(forged if isinstance(forged, str) else forged.decode())


def test_the_values_of_one_version_signed_as_the_other_are_refused() -> None:
    """A salt binds a signature to the order of the fields."""
    signer = PredictionSigner([NEW])
    for version, claim in ((1, CLAIM_2), (2, CLAIM)):
        forged = signer._serializers[version].dumps(packed(claim))
        with pytest.raises(BadPredictionIdError):
            signer.verify(forged if isinstance(forged, str) else forged.decode())


def test_an_id_that_version_1_issued_still_verifies_under_the_same_key() -> None:
    """Made by the last release: a label for it must find the row that is stored for it."""
    claim = PredictionSigner(["s" * 40]).verify(ID_OF_VERSION_1)
    assert (claim.label, claim.confidence, claim.nonce) == (
        "billing",
        0.333333333,
        "abcdefghijklmnop",
    )
    assert claim.reproduction is None
    assert claim.digest.hex() == DIGEST_OF_VERSION_1


@given(mask_set=st.none() | TEXTS, combined=st.none() | TEXTS, cut=st.booleans())
def test_an_id_of_version_2_gives_back_what_replay_needs(
    mask_set: str | None, combined: str | None, cut: bool
) -> None:
    reproduction = make_reproduction(mask_set=mask_set, combined_with=combined, truncated=cut)
    claim = make_claim(reproduction=reproduction, confidence=0.5)
    signer = PredictionSigner([NEW])
    assert signer.verify(signer.sign(claim)) == claim
    assert len(claim.digest) == 32
    assert claim.digest != replace(claim, reproduction=None).digest


def test_an_id_of_version_2_is_short_enough_for_a_log_line() -> None:
    assert len(PredictionSigner([NEW]).sign(CLAIM_2)) <= 460


def test_an_id_can_be_read_without_its_secret_and_is_then_unverified() -> None:
    for claim in (CLAIM, CLAIM_2):
        forged = PredictionSigner([OTHER]).sign(claim)
        assert claim_unverified(forged) == claim
        with pytest.raises(BadPredictionIdError):
            PredictionSigner([NEW]).verify(forged)


@pytest.mark.parametrize("text", ["", ".", "abc", "W10.x", "\ud800", ".eJw.x", "eyJ9." * 9])
def test_what_is_no_id_cannot_be_read_either(text: str) -> None:
    with pytest.raises(BadPredictionIdError):
        claim_unverified(text)


def test_the_digest_of_an_answer_is_of_its_labels_and_of_every_bit() -> None:
    digest = answer_digest(("a", "b"), (0.25, 0.75))
    assert digest == answer_digest(["a", "b"], [0.25, 0.75])
    assert len(digest) == 32
    others = [
        answer_digest(("b", "a"), (0.25, 0.75)),
        answer_digest(("a", "b"), (math.nextafter(0.25, 1), 0.75)),
        answer_digest(("a", "b"), (0.75, 0.25)),
        answer_digest(('a", "b',), (0.25, 0.75)),
    ]
    assert len({digest, *others}) == 5


def test_the_first_secret_signs_and_every_one_verifies() -> None:
    before = PredictionSigner([OLD]).sign(CLAIM)
    rotated = PredictionSigner([NEW, OLD])
    assert rotated.verify(before) == CLAIM
    after = rotated.sign(CLAIM)
    assert PredictionSigner([NEW]).verify(after) == CLAIM
    with pytest.raises(BadPredictionIdError):
        PredictionSigner([OLD]).verify(after)


def test_the_signature_is_hmac_sha256() -> None:
    signature = PredictionSigner([NEW]).sign(CLAIM).rpartition(".")[2]
    assert len(base64.urlsafe_b64decode(signature + "=")) == 32


def test_claims_differ_by_their_nonce_only_and_yet_have_other_digests() -> None:
    digests = {make_claim().digest for _ in range(100)}
    assert len(digests) == 100
    assert {len(digest) for digest in digests} == {32}


def test_a_signer_needs_a_secret() -> None:
    with pytest.raises(ValueError, match="at least one secret"):
        PredictionSigner([])


def test_a_secret_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "secret"
    made = load_secrets(path, create=True)
    assert len(made) == 1
    assert len(made[0]) >= MIN_SECRET_CHARS
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert load_secrets(path, create=True) == made
    assert [entry.name for entry in path.parent.iterdir()] == ["secret"]


def test_processes_that_race_for_the_secret_get_the_same_one(tmp_path: Path) -> None:
    path, go = tmp_path / "secret", tmp_path / "go"
    program = (
        "import sys, time; from pathlib import Path\n"
        "from server.feedback.signing import load_secrets\n"
        "go = Path(sys.argv[2]); print('ready', flush=True)\n"
        "while not go.exists(): pass\n"
        "print(load_secrets(Path(sys.argv[1]), create=True)[0])\n"
    )
    command = [sys.executable, "-c", program, str(path), str(go)]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    go.touch()
    found = {racer.communicate(timeout=30)[0].strip() for racer in racers}
    assert found == {path.read_text().strip()}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["go", "secret"]


def test_several_secrets_stand_one_on_each_line(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(f"\n  {NEW}\n\n{OLD}\n")
    assert load_secrets(path, create=False) == (NEW, OLD)


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "shortest has 0"), (b"tiny\n", "shortest has 4"), (b"\xff" * 40, "not UTF-8")],
)
def test_a_secret_file_that_cannot_serve(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "secret"
    path.write_bytes(content)
    with pytest.raises(FeedbackSetupError, match=says) as caught:
        load_secrets(path, create=True)
    assert str(path) in str(caught.value)
    assert str(caught.value).startswith("secret_file: ")


def test_a_secret_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FeedbackSetupError, match="No such file"):
        load_secrets(tmp_path / "none", create=False)


def test_a_secret_that_cannot_be_made(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(FeedbackSetupError, match="DALORRA_SECRET_FILE or DALORRA_STATE_DIR"):
        load_secrets(blocked / "secret", create=True)


def test_a_secret_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FeedbackSetupError, match="cannot be created or read: Is a directory"):
        load_secrets(tmp_path, create=True)
