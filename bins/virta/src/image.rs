//! `virta image list | show | set | delete`.

use std::{collections::HashMap, process::ExitCode};

use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};
use stages::{
    error::JobError,
    openstack::{Change, Image, Session, marks::SOURCE_ID},
    ownership::{Proof, claim, is_conversion, leftover::is_unfinished, refuse_unmarked},
    reporter::Reporter,
    text::{causes, printable, size},
};

use crate::{
    confirm::confirm,
    display::Display,
    exit,
    flags::{CloudArgs, check_format, key_value, parse_size},
    image_names::image_names,
    in_cloud::in_cloud,
    table::{Cell, Column, ListFlags, ListFormat, print_fields, print_rows},
};

/// The largest page that Glance gives (`api_limit_max`).
const PAGE: &str = "1000";

#[derive(Subcommand)]
pub enum ImageCommand {
    /// Images that this project may use, with sizes, and what conversion saved
    #[command(visible_alias = "ls")]
    List(ListArgs),
    /// Everything that is known of one image
    Show(ShowArgs),
    /// Change an image's name, tags, properties and requirements
    Set(SetArgs),
    /// Delete images. Asks first; refuses protected ones
    #[command(visible_alias = "rm")]
    Delete(DeleteArgs),
}

#[derive(Args)]
#[command(after_help = "\
Columns: id name disk_format size status visibility created_at; with -c or -f json also virtual_size owner image_type min_disk min_ram \
protected tags member_status converted_to converted_size saves.
Examples:
  virta image list --snapshots --format raw          the candidates for conversion
  virta image list --larger-than 20G -f value -c id  ids for a script
  virta image list --shared                          what others share with this project, pending ones included")]
pub struct ListArgs {
    /// Only snapshots of servers
    #[arg(long)]
    pub snapshots: bool,
    /// Only images of this disk format: raw, qcow2, iso, …
    #[arg(long = "disk-format", value_name = "FORMAT")]
    pub disk_format: Option<String>,
    /// What is printed: table, json or value; a disk format is taken for --disk-format
    #[arg(short = 'f', long = "format", value_name = "FORMAT")]
    pub format: Vec<String>,
    /// Only this column, by its name in the table or in JSON (may be repeated; their order is kept)
    #[arg(short = 'c', long = "column", value_name = "COLUMN")]
    pub columns: Vec<String>,
    /// Only images larger than this, SIZE
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub larger_than: Option<u64>,
    /// Only images whose name has this in it
    #[arg(long, value_name = "TEXT")]
    pub name: Option<String>,
    /// Only this project's own images
    #[arg(long, conflicts_with = "shared")]
    pub mine: bool,
    /// Only images that other projects share with this one, with what was answered: pending, accepted, rejected
    #[arg(long)]
    pub shared: bool,
    #[command(flatten)]
    pub cloud: CloudArgs,
}

impl ListArgs {
    /// The output's format and the disk's: `--format raw` means the one, `--format json` the other.
    fn formats(&self) -> (ListFlags, Option<&str>) {
        let output = |word: &String| ListFormat::from_str(word, true).ok();
        let format = self.format.iter().rev().find_map(output).unwrap_or(ListFormat::Table);
        let disk = self.format.iter().rev().find(|word| output(word).is_none()).or(self.disk_format.as_ref());
        (ListFlags { format, columns: self.columns.clone() }, disk.map(String::as_str))
    }
}

#[derive(Args)]
pub struct ShowArgs {
    /// A name or an id
    #[arg(add = image_names())]
    pub image: String,
    #[command(flatten)]
    pub cloud: CloudArgs,
    #[command(flatten)]
    pub list: ListFlags,
}

#[derive(Args)]
#[command(
    after_help = "All changes are made at once, or none. Example: virta image set old-name --name new-name --tag checked --min-disk 20"
)]
pub struct SetArgs {
    /// A name or an id
    #[arg(add = image_names())]
    pub image: String,
    /// A new name. Names need not be unique, but two of one name are refused elsewhere
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Add a tag (may be repeated)
    #[arg(long, value_name = "TAG")]
    pub tag: Vec<String>,
    /// Take a tag off (may be repeated)
    #[arg(long, value_name = "TAG")]
    pub remove_tag: Vec<String>,
    /// Set a property (may be repeated)
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value)]
    pub property: Vec<(String, String)>,
    /// Take a property off (may be repeated)
    #[arg(long, value_name = "KEY")]
    pub remove_property: Vec<String>,
    /// GiB that a server's disk has to have
    #[arg(long, value_name = "GIB")]
    pub min_disk: Option<u64>,
    /// MiB that a server's memory has to have
    #[arg(long, value_name = "MIB")]
    pub min_ram: Option<u64>,
    /// It cannot be deleted
    #[arg(long, conflicts_with = "unprotected")]
    pub protected: bool,
    /// It can be deleted again
    #[arg(long)]
    pub unprotected: bool,
    #[command(flatten)]
    pub cloud: CloudArgs,
}

#[derive(Args)]
#[command(
    after_help = "Nothing is deleted unless all of them can be: a name that two images have, an unknown or a protected one stops it before."
)]
pub struct DeleteArgs {
    /// Names or ids
    #[arg(required = true, add = image_names())]
    pub images: Vec<String>,
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
    #[command(flatten)]
    pub cloud: CloudArgs,
}

/// Runs the command.
pub async fn run(command: ImageCommand) -> ExitCode {
    match command {
        ImageCommand::List(arguments) => {
            in_cloud(&arguments.cloud, async |session, display, _| list(&arguments, session, display).await).await
        }
        ImageCommand::Show(arguments) => {
            in_cloud(&arguments.cloud, async |session, _, _| {
                let image = session.find_image(&arguments.image).await?;
                print_fields(&fields(&image), &arguments.list)
            })
            .await
        }
        ImageCommand::Set(arguments) => {
            in_cloud(&arguments.cloud, async |session, display, _| set(&arguments, session, display).await).await
        }
        ImageCommand::Delete(arguments) => {
            in_cloud(&arguments.cloud, async |session, display, cancel| {
                let images = to_delete(&arguments.images, session, display).await?;
                let who = session.whoami();
                let lines: Vec<String> = images.iter().map(|image| format!("  {}  {}", image.shown(), image.line())).collect();
                let question = format!(
                    "{}\nDelete {} for good from cloud {}, project {}",
                    lines.join("\n"),
                    counted(images.len(), "image"),
                    who.cloud,
                    who.project
                );
                confirm(&question, arguments.yes, cancel).await?;
                delete(&images, session, display).await
            })
            .await
        }
    }
}

/// `1 image`, `2 images`.
pub fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

const fn column(key: &'static str, heading: &'static str, usual: bool, right: bool) -> Column {
    Column { key, heading, usual, right }
}

const COLUMNS: [Column; 18] = [
    column("id", "ID", true, false),
    column("name", "Name", true, false),
    column("disk_format", "Format", true, false),
    column("size", "Size", true, true),
    column("virtual_size", "Virtual size", false, true),
    column("status", "Status", true, false),
    column("visibility", "Visibility", true, false),
    column("created_at", "Created (UTC)", true, false),
    column("saves", "Conversion saves", true, true),
    column("converted_to", "Converted to", false, false),
    column("converted_size", "Converted size", false, true),
    column("owner", "Owner", false, false),
    column("image_type", "Type", false, false),
    column("min_disk", "Min disk", false, true),
    column("min_ram", "Min RAM", false, true),
    column("protected", "Protected", false, false),
    column("tags", "Tags", false, false),
    column("member_status", "Sharing", false, false),
];

/// All images that the filters leave, by name.
async fn list(arguments: &ListArgs, session: &Session, display: &Display) -> Result<(), JobError> {
    let (flags, disk_format) = arguments.formats();
    let mut statuses: HashMap<String, &'static str> = HashMap::new();
    if let Some(format) = disk_format {
        check_format(format)?;
    }
    let everything = match arguments.shared {
        true => {
            let mut shared = Vec::new();
            for status in ["pending", "accepted", "rejected"] {
                let filters = [("visibility", "shared"), ("member_status", status), ("limit", PAGE)];
                let own = session.whoami().project_id.clone();
                let found = session.images_matching(&filters).await?.into_iter().filter(|image| image.owner != own);
                shared.extend(found.inspect(|image| _ = statuses.insert(image.id.clone(), status)));
            }
            shared
        }
        false => session.images_matching(&[("limit", PAGE)]).await?,
    };
    let converted = conversions(session, &everything);
    let own = session.whoami().project_id.clone();
    let wanted = |image: &&Image| {
        let name = image.name.as_deref().unwrap_or_default().to_lowercase();
        (!arguments.snapshots || image.property("image_type") == Some("snapshot"))
            && disk_format.is_none_or(|format| image.disk_format.as_ref().is_some_and(|is| is.eq_ignore_ascii_case(format)))
            && arguments.larger_than.is_none_or(|bytes| image.size.unwrap_or(0) > bytes)
            && arguments.name.as_ref().is_none_or(|part| name.contains(&part.to_lowercase()))
            && (!arguments.mine || image.owner == own)
    };
    let mut images: Vec<&Image> = everything.iter().filter(wanted).collect();
    images.sort_by(|a, b| (&a.name, &a.created_at, &a.id).cmp(&(&b.name, &b.created_at, &b.id)));
    let rows: Vec<Vec<Cell>> = images.iter().map(|image| row(image, converted.get(&image.id), statuses.get(&image.id))).collect();
    let mut columns = COLUMNS;
    if arguments.shared {
        // what matters there
        columns
            .iter_mut()
            .filter(|column| matches!(column.key, "member_status" | "owner"))
            .for_each(|column| column.usual = true);
    }
    let any_saving = images.iter().any(|image| converted.contains_key(&image.id));
    columns.iter_mut().filter(|column| column.key == "saves").for_each(|column| column.usual = any_saving);
    print_rows(&columns, &rows, &flags)?;
    if flags.format == ListFormat::Table {
        display.note(&totals(&images, &converted));
        if images.iter().any(|image| statuses.get(&image.id) == Some(&"pending")) {
            display.note("a pending one is accepted with: virta accept ID, and turned down with: virta reject ID");
        }
    }
    Ok(())
}

/// Finished conversions, by their source's id.
fn conversions<'a>(session: &Session, images: &'a [Image]) -> HashMap<String, &'a Image> {
    let by_id: HashMap<&str, &Image> = images.iter().map(|image| (image.id.as_str(), image)).collect();
    let of_source = |made: &'a Image| {
        let source = by_id.get(made.property(SOURCE_ID)?)?;
        is_conversion(session, made, source, Proof::Hash).then(|| (source.id.clone(), made))
    };
    images.iter().filter_map(of_source).collect()
}

fn totals(images: &[&Image], converted: &HashMap<String, &Image>) -> String {
    let bytes = |images: &mut dyn Iterator<Item = &&Image>| images.map(|image| image.size.unwrap_or(0)).sum::<u64>();
    let all = bytes(&mut images.iter());
    if images.is_empty() {
        return "no image".to_owned();
    }
    let is_raw = |image: &&&Image| image.disk_format.as_deref() == Some("raw") && image.status == "active";

    let raw = images.iter().filter(is_raw).count();
    let mut text = format!("{}, {}", counted(images.len(), "image"), size(all));
    if raw > 0 {
        text += &format!("; {raw} raw, {}", size(bytes(&mut images.iter().filter(is_raw))));
    }
    let done: Vec<(&Image, &Image)> =
        images.iter().filter_map(|image| converted.get(&image.id).map(|made| (*image, *made))).collect();
    if !done.is_empty() {
        let freed: u64 = done.iter().map(|(source, _)| source.size.unwrap_or(0)).sum();
        text += &format!("; {} converted already: deleting what they were made from frees {}", done.len(), size(freed));
    }
    text
}

fn row(image: &Image, converted: Option<&&Image>, member_status: Option<&&'static str>) -> Vec<Cell> {
    let text = |text: &Option<String>| Cell::plain(text.clone());
    let bytes = |bytes: Option<u64>| Cell::shown(bytes, bytes.map(size).unwrap_or_default());
    let saves = converted.map(|made| image.size.unwrap_or(0).saturating_sub(made.size.unwrap_or(0)));
    COLUMNS
        .iter()
        .map(|column| match column.key {
            "id" => Cell::plain(image.id.clone()),
            "name" => text(&image.name),
            "disk_format" => text(&image.disk_format),
            "size" => bytes(image.size),
            "virtual_size" => bytes(image.virtual_size),
            "status" => Cell::plain(image.status.clone()),
            "visibility" => text(&image.visibility),
            "created_at" => Cell::shown(image.created_at.clone(), when(image.created_at.as_deref())),
            "saves" => bytes(saves),
            "converted_to" => Cell::plain(converted.map(|made| made.id.clone())),
            "converted_size" => bytes(converted.and_then(|made| made.size)),
            "owner" => text(&image.owner),
            "image_type" => Cell::plain(image.property("image_type").map(str::to_owned)),
            "min_disk" => Cell::plain(image.min_disk),
            "min_ram" => Cell::plain(image.min_ram),
            "protected" => Cell::plain(image.protected),
            "tags" => Cell::shown(json!(image.tags), image.tags.join(",")),
            _ => Cell::plain(member_status.map(|status| (*status).to_owned())),
        })
        .collect()
}

/// `2026-11-24 12:00`.
fn when(at: Option<&str>) -> String {
    let at = at.unwrap_or_default();
    at.get(..16).map_or_else(|| at.to_owned(), |minutes| minutes.replace('T', " "))
}

/// All that is known of an image, its properties behind its attributes.
fn fields(image: &Image) -> Vec<(String, Cell)> {
    let bytes =
        |bytes: Option<u64>| Cell::shown(bytes, bytes.map(|bytes| format!("{bytes} ({})", size(bytes))).unwrap_or_default());
    let text = |text: &Option<String>| Cell::plain(text.clone());
    let mut fields: Vec<(String, Cell)> = [
        ("id", Cell::plain(image.id.clone())),
        ("name", text(&image.name)),
        ("status", Cell::plain(image.status.clone())),
        ("disk_format", text(&image.disk_format)),
        ("container_format", text(&image.container_format)),
        ("size", bytes(image.size)),
        ("virtual_size", bytes(image.virtual_size)),
        ("min_disk", Cell::shown(image.min_disk, image.min_disk.map(|gib| format!("{gib} GiB")).unwrap_or_default())),
        ("min_ram", Cell::shown(image.min_ram, image.min_ram.map(|mib| format!("{mib} MiB")).unwrap_or_default())),
        ("visibility", text(&image.visibility)),
        ("owner", text(&image.owner)),
        ("protected", Cell::plain(image.protected)),
        ("os_hidden", Cell::plain(image.os_hidden)),
        ("tags", Cell::shown(json!(image.tags), image.tags.join(", "))),
        ("created_at", text(&image.created_at)),
        ("checksum", text(&image.checksum)),
        ("os_hash_algo", text(&image.os_hash_algo)),
        ("os_hash_value", text(&image.os_hash_value)),
    ]
    .into_iter()
    .map(|(key, cell)| (key.to_owned(), cell))
    .collect();
    fields.extend(image.properties.iter().map(|(key, value)| (key.clone(), Cell::plain(value.clone()))));
    fields
}

/// What `set` asks for, as changes.
fn changes(arguments: &SetArgs, image: &Image) -> Result<Vec<Change>, JobError> {
    let mut changes = Vec::new();
    let mut set = |key: &str, value: Value| changes.push(Change::Set(key.to_owned(), value));
    if arguments.name.as_deref() == Some("") || arguments.tag.iter().any(String::is_empty) {
        return Err(JobError::Usage("a name or a tag has at least one character".to_owned()));
    }
    if let Some(name) = &arguments.name {
        set("name", json!(name));
    }
    if let Some(gib) = arguments.min_disk {
        set("min_disk", json!(gib));
    }
    if let Some(mib) = arguments.min_ram {
        set("min_ram", json!(mib));
    }
    if arguments.protected || arguments.unprotected {
        set("protected", json!(arguments.protected));
    }
    if !arguments.tag.is_empty() || !arguments.remove_tag.is_empty() {
        let mut tags: Vec<&String> = image.tags.iter().filter(|tag| !arguments.remove_tag.contains(tag)).collect();
        tags.extend(arguments.tag.iter().filter(|tag| !image.tags.contains(tag)));
        set("tags", json!(tags));
    }
    let reserved = |key: &str| -> Result<(), JobError> {
        match key.starts_with("virta_") {
            true => Err(JobError::Usage(format!("property {}: later runs rely on what Virta wrote there", printable(key)))),
            false => Ok(()),
        }
    };
    for (key, value) in &arguments.property {
        reserved(key)?;
        if let Some(how) = attribute(key) {
            return Err(JobError::Usage(format!("{key} is no property but an attribute: {how}")));
        }
        changes.push(Change::Set(key.clone(), json!(value)));
    }
    for key in &arguments.remove_property {
        reserved(key)?;
        if !image.properties.contains_key(key) {
            return Err(JobError::Usage(format!("image {} has no property {}", image.shown(), printable(key))));
        }
        changes.push(Change::Remove(key.clone()));
    }
    if changes.is_empty() {
        return Err(JobError::Usage("nothing to change: see virta help image set for what there is".to_owned()));
    }
    Ok(changes)
}

/// How an attribute is set, that some would set as a property.
fn attribute(key: &str) -> Option<&'static str> {
    Some(match key {
        "name" => "use --name",
        "min_disk" => "use --min-disk",
        "min_ram" => "use --min-ram",
        "protected" => "use --protected or --unprotected",
        "tags" => "use --tag and --remove-tag",
        "visibility" => "use virta share and virta unshare, or openstack image set",
        "id" | "status" | "size" | "virtual_size" | "checksum" | "created_at" | "updated_at" | "owner" | "file" | "self"
        | "schema" | "disk_format" | "container_format" | "os_hash_algo" | "os_hash_value" | "stores" | "locations" => {
            "it cannot be changed"
        }
        _ => return None,
    })
}

async fn set(arguments: &SetArgs, session: &Session, display: &Display) -> Result<(), JobError> {
    let image = session.find_image(&arguments.image).await?;
    if image.owner.is_some() && image.owner != session.whoami().project_id {
        return Err(JobError::Refused(format!(
            "image {} ({}) belongs to another project ({}): only that one can change it. A copy of it is yours: virta convert glance:{} glance:NAME",
            image.shown(),
            image.shown_id(),
            printable(image.owner.as_deref().unwrap_or_default()),
            image.shown_id()
        )));
    }
    refuse_unmarked(session, &image)?;
    let changed = session.change_image(&image.id, &changes(arguments, &image)?).await?;
    if let (Some(gib), Some(bytes)) = (arguments.min_disk, changed.virtual_size)
        && gib.saturating_mul(1 << 30) < bytes
    {
        display.warn(&format!(
            "a disk of {gib} GiB does not hold this image, which is {} large: servers on it will fail",
            size(bytes)
        ));
    }
    display.note(&format!("image {} ({}) is changed", changed.shown(), changed.shown_id()));
    Ok(())
}

/// The images, each once, if all of them can be deleted.
async fn to_delete(names: &[String], session: &Session, display: &Display) -> Result<Vec<Image>, JobError> {
    let mut images: Vec<Image> = Vec::new();
    for name in names {
        let image = session.find_image(name).await?;
        if image.protected == Some(true) {
            return Err(JobError::Refused(format!(
                "image {} ({}) is protected, so nothing is deleted; to lift that: virta image set --unprotected {}",
                image.shown(),
                image.shown_id(),
                image.shown_id()
            )));
        }
        if image.owner.is_some() && image.owner != session.whoami().project_id {
            return Err(JobError::Refused(format!(
                "image {} ({}) belongs to another project ({}): only that one can delete it. To be rid of a shared one: virta reject {}",
                image.shown(),
                image.shown_id(),
                printable(image.owner.as_deref().unwrap_or_default()),
                image.shown_id()
            )));
        }
        if let Some(until) =
            claim::good_until(&image, session.now()).filter(|_| is_unfinished(&image, session.whoami().project_id.as_deref()))
        {
            display.warn(&format!(
                "image {} ({}) is unfinished: a run may be making it until {until}",
                image.shown(),
                image.shown_id()
            ));
        }
        if images.iter().all(|known| known.id != image.id) {
            images.push(image);
        }
    }
    Ok(images)
}

/// Deletes them; one that fails does not keep the others.
async fn delete(images: &[Image], session: &Session, display: &Display) -> Result<(), JobError> {
    let mut failed = Vec::new();
    for image in images {
        match session.delete_image(&image.id).await {
            Ok(()) => display.note(&format!("deleted image {} ({})", image.shown(), image.shown_id())),
            Err(error) => {
                exit::say(&format!("virta: image {} ({}) was not deleted: {}", image.shown(), image.shown_id(), causes(&error)));
                failed.push(error);
            }
        }
    }
    match failed.len() {
        0 => Ok(()),
        count => Err(JobError::Refused(format!("{} of {} could not be deleted", count, counted(images.len(), "image")))),
    }
}
