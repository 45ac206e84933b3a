//! Rows for people, for programs and for shells: what `-f` and `-c` mean.

use clap::{Args, ValueEnum};
use comfy_table::{CellAlignment, Table, presets::NOTHING};
use serde_json::{Map, Value};
use stages::{error::JobError, text::printable};

use crate::exit;

/// Flags of commands that list something, as `openstack` has them.
#[derive(Args, Clone)]
pub struct ListFlags {
    /// What is printed on stdout
    #[arg(short = 'f', long = "format", value_name = "FORMAT", default_value = "table")]
    pub format: ListFormat,
    /// Only this column, by its name in the table or in JSON (may be repeated; their order is kept)
    #[arg(short = 'c', long = "column", value_name = "COLUMN")]
    pub columns: Vec<String>,
}

/// How rows are printed.
#[derive(Clone, Copy, ValueEnum, PartialEq, Eq)]
pub enum ListFormat {
    /// Columns for people: sizes in GiB, times in UTC
    Table,
    /// An array of objects: sizes in bytes
    Json,
    /// Bare values, a row a line
    Value,
}

/// A column: its name in JSON, its heading, and whether a table shows it unasked.
#[derive(Clone, Copy)]
pub struct Column {
    /// In JSON.
    pub key: &'static str,
    /// In a table.
    pub heading: &'static str,
    /// Shown in a table that nobody asked for columns.
    pub usual: bool,
    /// Numbers stand to the right.
    pub right: bool,
}

/// A value, for programs and for people.
#[derive(Clone)]
pub struct Cell {
    /// For programs.
    pub value: Value,
    /// For people.
    pub shown: String,
}

impl Cell {
    /// A value that people read as it is.
    pub fn plain(value: impl Into<Value>) -> Self {
        let value = value.into();
        let shown = printable(&bare(&value));
        Self { value, shown }
    }

    /// A value that people read otherwise.
    pub fn shown(value: impl Into<Value>, shown: String) -> Self {
        Self { value: value.into(), shown: printable(&shown) }
    }
}

/// A value as a shell wants it: no quotes, nothing for null.
pub fn bare(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Prints rows. Columns that there are not are named, with those that there are.
///
/// # Errors
/// A usage error, or that stdout could not be written.
pub fn print_rows(columns: &[Column], rows: &[Vec<Cell>], flags: &ListFlags) -> Result<(), JobError> {
    let mut written = true;
    let chosen = choose(columns, &flags.columns).map_err(JobError::Usage)?;
    match flags.format {
        ListFormat::Json => {
            // a program gets everything, unless it chose
            let all: Vec<usize> = (0..columns.len()).collect();
            let chosen = if flags.columns.is_empty() { &all } else { &chosen };
            let object = |row: &Vec<Cell>| {
                chosen.iter().map(|&at| (columns[at].key.to_owned(), row[at].value.clone())).collect::<Map<_, _>>()
            };
            let objects: Vec<Value> = rows.iter().map(|row| Value::Object(object(row))).collect();
            written = exit::show(&serde_json::to_string_pretty(&objects).unwrap_or_default());
        }
        ListFormat::Value => {
            for row in rows {
                let line: Vec<String> = chosen.iter().map(|&at| printable(&bare(&row[at].value))).collect();
                written &= exit::show(&line.join(" "));
            }
        }
        ListFormat::Table if rows.is_empty() => {}
        ListFormat::Table => {
            let mut table = Table::new();
            table.load_style(NOTHING);
            table.set_header(chosen.iter().map(|&at| columns[at].heading));
            for row in rows {
                table.add_row(chosen.iter().map(|&at| row[at].shown.as_str()));
            }
            for (number, &at) in chosen.iter().enumerate() {
                if let Some(column) = table.column_mut(number) {
                    column.set_padding((0, 2));
                    if columns[at].right {
                        column.set_cell_alignment(CellAlignment::Right);
                    }
                }
            }
            let text = table.to_string();
            let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
            written = exit::show(&lines.join("\n"));
        }
    }
    complete(written)
}

/// Prints one thing's fields, a line each; in JSON an object.
///
/// # Errors
/// A usage error, or that stdout could not be written.
pub fn print_fields(fields: &[(String, Cell)], flags: &ListFlags) -> Result<(), JobError> {
    let mut written = true;
    let find = |name: &String| {
        fields.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).ok_or_else(|| {
            let known: Vec<&str> = fields.iter().map(|(key, _)| key.as_str()).collect();
            JobError::Usage(format!("there is no field {}; there are: {}", printable(name), printable(&known.join(", "))))
        })
    };
    let chosen: Vec<&(String, Cell)> = match flags.columns.is_empty() {
        true => fields.iter().collect(),
        false => flags.columns.iter().map(find).collect::<Result<_, _>>()?,
    };
    match flags.format {
        ListFormat::Json => {
            let object: Map<String, Value> = chosen.iter().map(|(key, cell)| (key.clone(), cell.value.clone())).collect();
            written = exit::show(&serde_json::to_string_pretty(&object).unwrap_or_default());
        }
        ListFormat::Value => chosen.iter().for_each(|(_, cell)| written &= exit::show(&printable(&bare(&cell.value)))),
        ListFormat::Table => {
            let width = chosen.iter().map(|(key, _)| key.chars().count()).max().unwrap_or(0);
            for (key, cell) in chosen {
                written &= exit::show(format!("{:<width$}  {}", printable(key), cell.shown).trim_end());
            }
        }
    }
    complete(written)
}

/// Was all of it written?
fn complete(written: bool) -> Result<(), JobError> {
    let what = "stdout could not be written (a full disk?): what is there is not complete";
    if written { Ok(()) } else { Err(JobError::Refused(what.to_owned())) }
}

/// Positions of the columns that are asked for, or of the usual ones.
fn choose(columns: &[Column], wanted: &[String]) -> Result<Vec<usize>, String> {
    if wanted.is_empty() {
        return Ok((0..columns.len()).filter(|&at| columns[at].usual).collect());
    }
    let position = |name: &String| {
        let is = |column: &Column| column.key.eq_ignore_ascii_case(name) || column.heading.eq_ignore_ascii_case(name);
        columns.iter().position(is).ok_or_else(|| {
            let known: Vec<&str> = columns.iter().map(|column| column.key).collect();
            format!("there is no column {}; there are: {}", printable(name), known.join(", "))
        })
    };
    wanted.iter().map(position).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: [Column; 3] = [
        Column { key: "id", heading: "ID", usual: true, right: false },
        Column { key: "size", heading: "Size", usual: true, right: true },
        Column { key: "owner", heading: "Owner", usual: false, right: false },
    ];

    #[test]
    fn columns_are_chosen_by_either_name_and_their_order_is_kept() {
        let choose = |names: &[&str]| choose(&COLUMNS, &names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>());
        assert_eq!(choose(&[]).unwrap(), [0, 1]);
        assert_eq!(choose(&["Owner", "ID"]).unwrap(), [2, 0]);
        assert!(choose(&["nmae"]).unwrap_err().contains("id, size, owner"));
    }

    #[test]
    fn a_shell_gets_bare_values() {
        assert_eq!(bare(&Value::Null), "");
        assert_eq!(bare(&Value::from("a b")), "a b");
        assert_eq!(bare(&Value::from(7)), "7");
    }
}
