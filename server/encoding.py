"""From a request's questions to the engine's rows; every row that cannot be encoded is named."""

from server.errors import ApiError
from server.ports import (
    AdapterCard,
    ChoiceQuestion,
    EncodedRow,
    Engine,
    Question,
    RowRejectedError,
    RowTooLongError,
)
from server.schemas import ClassifyRequest

__all__ = ["check_kind", "encode"]


def check_kind(request: ClassifyRequest, question: Question, card: AdapterCard) -> None:
    """Refuse texts for a multiple-choice adapter and questions for a text adapter.

    Raises:
        ApiError: 422 saying which form the adapter wants.
    """
    asked = "choice" if isinstance(question, ChoiceQuestion) else "text"
    if asked == card.kind:
        return
    wanted = "a text" if card.kind == "text" else "an object with question and choices"
    raise ApiError(
        "invalid_request",
        f"adapter {card.name} answers {card.kind} input: send {wanted} per row",
        errors=({"pointer": request.pointer(0), "code": "wrong_input_form"},),
    )


def encode(
    engine: Engine, card: AdapterCard, request: ClassifyRequest, questions: list[Question]
) -> tuple[EncodedRow, ...]:
    """Encode every row; runs in a thread.

    Raises:
        ApiError: 422 naming every row that cannot be encoded.
    """
    rows: list[EncodedRow] = []
    faults: list[dict[str, object]] = []
    for index, question in enumerate(questions):
        try:
            rows.append(engine.encode(card.key, question, request.truncate))
        except RowTooLongError as error:
            fault = {"code": "input_too_long", "limit": error.limit, "actual": error.actual}
            details = {"detail": str(error), "unit": "tokens"}
            faults.append({"pointer": request.pointer(index), **fault, **details})
        except RowRejectedError as error:
            fault = {"code": "input_rejected", "detail": str(error)}
            faults.append({"pointer": request.pointer(index), **fault})
    if faults:
        code = "input_too_long" if faults[0]["code"] == "input_too_long" else "input_rejected"
        detail = f"{faults[0]['pointer']}: {faults[0]['detail']}"
        raise ApiError(code, detail, errors=tuple(faults))
    return tuple(rows)
