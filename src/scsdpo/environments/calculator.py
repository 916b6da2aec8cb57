"""A tool for arithmetic, which needs nothing else."""

import ast
import operator
from collections.abc import Callable
from fractions import Fraction

_SIGNS: dict[type[ast.AST], Callable[..., Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_LONGEST, _LARGEST = 1_000, 1_000
"""Limits on the characters of an expression, and on the bits of intermediate numbers."""


def calculate(expression: str) -> str:
    """Compute an arithmetic expression exactly.

    Args:
        expression: numbers with + - * / // % ** and brackets, such as (3 + 4) * 2.5.
    """
    if len(expression) > _LONGEST:
        raise ValueError(f"an expression may have {_LONGEST} characters")
    value = _value(ast.parse(expression.strip(), mode="eval").body)
    return str(value) if value.denominator == 1 else f"{value} = {float(value):.10g}"


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = Fraction(str(node.value))
    elif isinstance(node, ast.UnaryOp) and type(node.op) in _SIGNS:
        value = _SIGNS[type(node.op)](_value(node.operand))
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        value = _power(_value(node.left), _value(node.right))
    elif isinstance(node, ast.BinOp) and type(node.op) in _SIGNS:
        value = _SIGNS[type(node.op)](_value(node.left), _value(node.right))
    else:
        raise ValueError(f"`{ast.unparse(node)}` is no arithmetic")
    if _bits(value) > _LARGEST:
        raise ValueError("a number on the way is too large")
    return value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ValueError("an exponent must be whole")
    if abs(exponent) * _bits(base) > 2 * _LARGEST:
        raise ValueError("a number on the way is too large")
    return base ** int(exponent)


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())
