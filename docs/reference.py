"""The reference page of a module, written from its source. Nothing is imported, so nothing heavy runs here."""
import ast
import copy
import io
import tokenize
from collections.abc import Iterator

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
Notes = dict[int, str]  # line number -> the comment on that line


def definitions(source: str) -> dict[str, ast.stmt]:
    "Names that code defines at its top level, each with the statement that does it."
    defined = {}
    for node in ast.parse(source).body:
        if isinstance(node, (*FUNCTION, ast.ClassDef)):
            defined[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined |= {n.id: node for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return defined


def public(source: str) -> dict[str, ast.stmt]:
    "The definitions of a module that its `__all__` lists."
    defined = definitions(source)
    listed = ast.literal_eval(defined["__all__"].value) if "__all__" in defined else []
    return {name: node for name, node in defined.items() if name in listed}


def docstring(node: ast.AST) -> str:
    "The docstring of a module, function or class."
    return (ast.get_docstring(node) if isinstance(node, (*FUNCTION, ast.ClassDef, ast.Module)) else "") or ""


def line_notes(source: str) -> Notes:
    "The comments of a module; one on the line of a parameter or of a result explains it."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}


def documentation_of(call: ast.expr | None) -> str:
    "The explanation inside of pydantic's `Field` or typer's `Option`, where there is one."
    words = {word.arg: word.value for word in call.keywords} if isinstance(call, ast.Call) else {}
    text = words.get("description", words.get("help"))
    return text.value if isinstance(text, ast.Constant) else ""


def unwrap(kind: ast.expr | None, value: ast.expr | None) -> tuple[ast.expr | None, ast.expr | None, str]:
    "Type, default and explanation, out of `Annotated`, `Field` and `Option`."
    around = [value]
    if isinstance(kind, ast.Subscript) and ast.unparse(kind.value) == "Annotated":
        kind, *around = [*kind.slice.elts, value]
    if documentation_of(value):
        value = value.args[0] if value.args else None
    return kind, value, next(filter(None, map(documentation_of, around)), "")


def maker(node: ast.ClassDef) -> ast.FunctionDef | None:
    "The `__init__` of a class."
    return next((inner for inner in node.body if isinstance(inner, FUNCTION) and inner.name == "__init__"), None)


def arguments(node: ast.stmt) -> ast.arguments:
    "The parameters of a function; of a class those of its `__init__`, or without one its fields."
    if isinstance(node, ast.ClassDef) and not maker(node):
        fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
        return ast.arguments(
            posonlyargs=[], args=[], defaults=[], kw_defaults=[field.value for field in fields],
            kwonlyargs=[ast.arg(field.target.id, field.annotation, lineno=field.lineno) for field in fields])
    return copy.deepcopy(maker(node).args if isinstance(node, ast.ClassDef) else node.args)


def rows(node: ast.stmt, notes: Notes) -> Iterator[tuple[str, str, str]]:
    "Name, type with default, and meaning of each argument, and of the result. Links leave the ``name`` alone."
    args, result = arguments(node), getattr(node, "returns", None)
    positional = args.posonlyargs + args.args
    values = [None] * (len(positional) - len(args.defaults)) + args.defaults + args.kw_defaults
    parameters = [("", arg, value) for arg, value in zip(positional + args.kwonlyargs, values, strict=True)]
    parameters += [(stars, arg, None) for stars, arg in (("*", args.vararg), ("**", args.kwarg)) if arg]
    for stars, arg, value in parameters:
        kind, value, wrapped = unwrap(arg.annotation, value)
        code = " = ".join(ast.unparse(part) for part in (kind, value) if part)
        note = "" if result and result.lineno == arg.lineno else notes.get(arg.lineno, "")
        if arg.arg not in ("self", "cls"):
            yield f"``{stars}{arg.arg}``", f"`{code}`" if code else "", note or wrapped
    if result and ast.unparse(result) != "None":
        yield "*returns*", f"`{ast.unparse(result)}`", notes.get(result.lineno, "")


def table(node: ast.stmt, notes: Notes) -> str:
    "`rows` as a Markdown table; nothing where they would say no more than the signature."
    cells = [[cell.replace("|", r"\|") for cell in row] for row in rows(node, notes)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join(["| name | type | meaning |", "|---|---|---|", *lines]) if any(any(r[1:]) for r in cells) else ""


def signature(node: ast.stmt) -> str:
    "The signature, with names and defaults; empty for what is not called."
    decorators, args = " ".join(ast.unparse(decorator) for decorator in node.decorator_list), arguments(node)
    fields = isinstance(node, ast.ClassDef) and not maker(node)
    if "property" in decorators or (fields and "dataclass" not in decorators):
        return ""
    args.args = [arg for arg in args.args if arg.arg not in ("self", "cls")]
    args.defaults = [unwrap(None, value)[1] or ast.Constant(...) for value in args.defaults]
    args.kw_defaults = [unwrap(None, value)[1] for value in args.kw_defaults]
    for arg in (inner for inner in ast.walk(args) if isinstance(inner, ast.arg)):
        arg.annotation = None
    return f"({ast.unparse(args).removeprefix('*, ' if fields else '')})"


def entry(name: str, node: ast.stmt, source: str, kind: str = "function", more: str = "") -> str:
    "One name as a directive of Sphinx's Python domain; a class holds its methods."
    fence, body = (":::" if kind == "method" else "::::"), []
    if isinstance(node, (*FUNCTION, ast.ClassDef)):
        text = name + signature(node)
        summary, _, rest = docstring(node).partition("\n\n")
        body = [f"{summary} {more}".strip(), rest, table(node, line_notes(source))]
    else:
        lines = source.splitlines()[node.lineno - 1:node.end_lineno]
        kind, text, body = "data", name, ["```python\n" + "\n".join(lines) + "\n```"]
    if isinstance(node, ast.ClassDef):
        kind = "class"
        body += [entry(inner.name, inner, source, "method") for inner in node.body
                 if isinstance(inner, FUNCTION) and not inner.name.startswith("_")]
    return "\n\n".join([f"{fence}{{py:{kind}}} {text}", *filter(None, body), fence])


def page(module: str, source: str, links: dict[str, str]) -> str:
    "The reference page of a module as MyST Markdown; `links` has for each name what follows its docstring."
    head = f"# {module}\n\n> {docstring(ast.parse(source))}\n\n```{{py:module}} {module}\n```"
    entries = [entry(name, node, source, more=links.get(name, "")) for name, node in public(source).items()]
    return "\n\n".join([head, *entries])
