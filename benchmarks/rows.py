"""Rows of a long measurement: kept in a CSV file as they are made, so that the program can resume."""

import csv
import io


def read(path, columns):
    """Returns the rows of `path` as dicts of strings, none where there is no such file.

    Raises:
        ValueError: it has other columns.
    """
    if not path.exists():
        return []
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != tuple(columns):
            raise ValueError(f"'{path}' has other columns than this program's rows. Choose another OUTPUT.")
        return list(reader)


def check_settings(row, settings, path):
    """Raises ValueError unless a row of `path` was made with these settings, a dict of strings."""
    for name, value in settings.items():
        if row[name] != value:
            raise ValueError(
                f"Expected {name}={row[name]!r} as in the rows of '{path}', received {value!r}. Choose "
                "another OUTPUT, or the settings of those rows."
            )


def write(rows, path, columns):
    content = io.StringIO(newline="")
    writer = csv.DictWriter(content, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(content.getvalue(), path)


def write_text(text, path):
    from keras_convnext._files import replacing_file

    with replacing_file(path) as file:
        file.write(text.encode())
