"""The difficulty of a query, easy, medium, hard or extra, by the rule of Spider's evaluation script.

The rule (Yu et al., EMNLP 2018; `eval_hardness` in evaluation.py of taoyds/spider) counts three kinds of
things in the outermost SELECT (for a query with UNION, INTERSECT or EXCEPT, in the first SELECT):

- clauses: WHERE, GROUP BY, ORDER BY, LIMIT, and each JOIN, OR and LIKE;
- nested queries in the conditions of WHERE, HAVING and ON, plus one for UNION, INTERSECT or EXCEPT;
- others: more than one aggregate, more than one column selected, more than one condition in WHERE, more than
  one column in GROUP BY.

Quirks of the script affect labels and are reproduced: a negated condition (NOT IN, NOT LIKE, NOT BETWEEN) in
WHERE or HAVING counts as an aggregate, and so does each AND and OR in HAVING, while count(*) > 3 in HAVING does
not; a query in FROM is not counted. The script cannot parse syntax that does not occur in Spider; here a common
table expression and EXISTS count as nested queries.
"""

from collections.abc import Iterable, Iterator
from typing import Literal

from sqlglot import exp
from sqlglot.errors import ParseError

from finetune.sql.parsing import shared_tree

Difficulty = Literal["easy", "medium", "hard", "extra"]


def difficulty(sql: str, dialect: str = "sqlite") -> Difficulty:
    """The label of a query. One that does not parse is "extra": since gold queries run, it must be unusual."""
    try:
        tree = shared_tree(sql, dialect)
    except ParseError:
        return "extra"
    first = tree
    while isinstance(first, exp.SetOperation | exp.Subquery):
        first = first.this
    where, having = first.args.get("where"), first.args.get("having")
    joins: list[exp.Join] = first.args.get("joins") or []
    conditions = [where, having, *(join.args.get("on") for join in joins)]

    clauses = sum(first.args.get(clause) is not None for clause in ("where", "group", "order", "limit"))
    clauses += len(joins) + _count(conditions, exp.Or) + _count(conditions, exp.Like, exp.ILike)

    nested = _count(conditions, exp.Query) + isinstance(tree, exp.SetOperation)
    nested += len(tree.ctes) if isinstance(tree, exp.Query) else 0

    grouped = first.args["group"].expressions if first.args.get("group") else []
    ordered = first.args["order"].expressions if first.args.get("order") else []
    aggregates = sum(bool(_count([column], exp.AggFunc)) for column in first.expressions)
    aggregates += _count([*grouped, *ordered], exp.AggFunc)
    aggregates += _negations(where) + _negations(having) + _count([having], exp.And, exp.Or)
    many_conditions = _count([where], exp.And, exp.Or) > 0
    others = (aggregates > 1) + (len(first.expressions) > 1) + many_conditions + (len(grouped) > 1)
    return _label(clauses, nested, others)


def _label(clauses: int, nested: int, others: int) -> Difficulty:
    if nested == 0:
        if clauses <= 1 and others == 0:
            return "easy"
        if (clauses <= 1 and others <= 2) or (clauses <= 2 and others <= 1):
            return "medium"
        if (clauses <= 2 and others > 2) or (clauses == 3 and others <= 2):
            return "hard"
    elif nested == 1 and clauses <= 1 and others == 0:
        return "hard"
    return "extra"


def _count(parts: Iterable[exp.Expr | None], *kinds: type[exp.Expr]) -> int:
    return sum(isinstance(node, kinds) for part in parts if part is not None for node in _own_nodes(part))


def _negations(condition: exp.Expr | None) -> int:
    nodes = _own_nodes(condition) if condition is not None else ()
    return sum(isinstance(node, exp.Not) and not isinstance(node.this, exp.Is) for node in nodes)


def _own_nodes(part: exp.Expr) -> Iterator[exp.Expr]:
    """The nodes of a part of a query, including nested queries but not what is inside them."""
    yield from part.walk(prune=lambda node: isinstance(node, exp.Query))
