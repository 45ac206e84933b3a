//! Image care and sharing: `virta image list | show | set | delete`, `share`, `members`, `unshare`, `accept`, `reject`.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod common;

use common::{Cloud, Run};
use mini_glance::identity::{OTHER_PROJECT_ID, PROJECT_ID};
use serde_json::{Value, json};

/// Two projects: `mini` has an image, `other` has none.
async fn cloud() -> Cloud {
    let cloud = Cloud::start_with(8, mini_glance::Config::default(), |_| {}).await;
    std::fs::write(cloud.folder.path().join("clouds.yaml"), cloud.service.two_clouds_yaml()).unwrap();
    cloud
}

async fn mini(cloud: &Cloud, line: &str) -> Run {
    let mut words: Vec<&str> = line.split(' ').collect();
    words.extend(["--os-cloud", "mini"]);
    cloud.run(&words).await
}

async fn other(cloud: &Cloud, line: &str) -> Run {
    let mut words: Vec<&str> = line.split(' ').collect();
    words.extend(["--os-cloud", "other"]);
    cloud.run(&words).await
}

fn add(cloud: &Cloud, record: &Value, bytes: usize) -> String {
    cloud.service.add_image(record, |storing| storing.write(&vec![5; bytes])).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_are_filtered_complete_and_the_same_for_people_programs_and_shells() {
    let cloud = cloud().await;
    // more than a page has
    for number in 0..1005 {
        add(&cloud, &json!({ "name": format!("base-{number:04}"), "disk_format": "qcow2", "container_format": "bare" }), 10);
    }
    let big = add(
        &cloud,
        &json!({ "name": "Big", "disk_format": "raw", "container_format": "bare", "image_type": "snapshot" }),
        20 << 20,
    );
    let all = mini(&cloud, "image list -f value -c id").await;
    all.ends(0, &[]);
    assert_eq!(all.stdout.lines().count(), 1007, "all pages, no image twice");
    let ids = async |line: &str| {
        let run = mini(&cloud, line).await;
        run.ends(0, &[]);
        run.stdout.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(ids("image list --snapshots -f value -c id").await.len(), 2);
    assert_eq!(ids("image list --larger-than 19M -f value -c id").await, std::slice::from_ref(&big));
    assert_eq!(ids("image list --name BIG --disk-format RAW --mine -f value -c ID").await, std::slice::from_ref(&big));
    assert_eq!(ids("image list --format raw --name big --format value -c id").await, std::slice::from_ref(&big));
    assert_eq!(ids("image list --name base-100 -f value -c name -c size").await[0], "base-1000 10");
    let json: Value = serde_json::from_str(&mini(&cloud, "image list --name big -f json").await.stdout).unwrap();
    assert_eq!((json[0]["id"].as_str(), json[0]["size"].as_u64()), (Some(big.as_str()), Some(20 << 20)));
    mini(&cloud, "image list --name big").await.ends(0, &["20.0 MiB", "1 image, 20.0 MiB; 1 raw"]);
    mini(&cloud, "image list -c nothing").await.ends(2, &["there is no column nothing", "disk_format"]);
    mini(&cloud, "image list --name nobody").await.ends(0, &["no image"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_conversion_saved_is_in_the_list() {
    let cloud = cloud().await;
    cloud.convert(&["--os-cloud", "mini"]).await.ends(0, &[]);
    // the snapshot of a server that was started from the converted image inherits its marks, and is nothing of the kind
    let mut heir = common::snapshot_record("heir");
    for key in ["virta_source_id", "virta_source_hash", "virta_verified"] {
        heir[key] = cloud.others()[0][key].clone();
    }
    let heir = add(&cloud, &heir, 100);
    let list = mini(&cloud, "image list --snapshots --name snap --disk-format raw -f json").await;
    let json: Value = serde_json::from_str(&list.stdout).unwrap();
    mini(&cloud, &format!("image delete {heir} --yes")).await.ends(0, &[]);
    let compact = cloud.assert_converted();
    assert_eq!(json[0]["converted_to"], compact["id"]);
    assert_eq!(json[0]["saves"].as_u64().unwrap(), cloud.raw.len() as u64 - compact["size"].as_u64().unwrap());
    mini(&cloud, "image list")
        .await
        .ends(0, &["Conversion saves", "1 converted already: deleting what they were made from frees"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_shown_and_changed_all_at_once_or_not_at_all() {
    let cloud = cloud().await;
    mini(
        &cloud,
        "image set snap --name new --tag a --tag b --remove-tag web --property x/y=z --min-disk 9 --min-ram 7 --protected",
    )
    .await
    .ends(0, &["is changed"]);
    let shown: Value = serde_json::from_str(&mini(&cloud, "image show new -f json").await.stdout).unwrap();
    assert_eq!((shown["name"].as_str(), &shown["tags"], shown["x/y"].as_str()), (Some("new"), &json!(["a", "b"]), Some("z")));
    assert_eq!(
        (shown["min_disk"].as_u64(), shown["min_ram"].as_u64(), shown["protected"].as_bool()),
        (Some(9), Some(7), Some(true))
    );
    assert_eq!(mini(&cloud, "image show new -f value -c x/y").await.stdout, "z\n");
    // one part is not allowed: nothing is changed
    mini(&cloud, "image set new --name other --property os_glance_x=y").await.ends(1, &["403", "is reserved", "req-"]);
    mini(&cloud, "image set new --property min_disk=20").await.ends(2, &["use --min-disk"]);
    mini(&cloud, "image set new --property id=1").await.ends(2, &["cannot be changed"]);
    mini(&cloud, "image show glance:new -c name -f value").await.ends(0, &["new"]);
    mini(&cloud, "image set new --name other --property virta_verified=x").await.ends(2, &["later runs rely on"]);
    mini(&cloud, "image set new --remove-property nothing").await.ends(2, &["has no property nothing"]);
    mini(&cloud, "image set new").await.ends(2, &["nothing to change"]);
    mini(&cloud, "image show new -c name -f value").await.ends(0, &["new"]);
    mini(&cloud, "image show nobody").await.ends(2, &["there is no image nobody"]);
    mini(&cloud, "image set new --remove-property x/y --unprotected").await.ends(0, &[]);
    mini(&cloud, "image show new -c x/y").await.ends(2, &["there is no field x/y"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_deleted_unless_everything_can_be_and_somebody_agreed() {
    let cloud = cloud().await;
    let second = add(&cloud, &json!({ "name": "second", "disk_format": "raw", "container_format": "bare" }), 100);
    let count = || cloud.service.images().len();
    mini(&cloud, "image delete snap second").await.ends(2, &["Delete 2 images for good from cloud mini", "add --yes", &second]);
    mini(&cloud, "image set second --protected").await.ends(0, &[]);
    mini(&cloud, "image delete snap second --yes").await.ends(1, &["is protected, so nothing is deleted", "--unprotected"]);
    mini(&cloud, "image delete snap nobody --yes").await.ends(2, &["there is no image nobody"]);
    add(&cloud, &json!({ "name": "snap", "disk_format": "raw", "container_format": "bare" }), 100);
    mini(&cloud, "image delete snap --yes").await.ends(2, &["there are 2 images called snap", &cloud.snapshot]);
    assert_eq!(count(), 3);
    mini(&cloud, "image set second --unprotected").await.ends(0, &[]);
    cloud.service.set_in_use(&second);
    // one that cannot be deleted after all does not keep the others
    mini(&cloud, &format!("image delete second {} {} --yes", cloud.snapshot, cloud.snapshot))
        .await
        .ends(1, &["409", "in use", "1 of 2 images could not be deleted", &format!("deleted image snap ({})", cloud.snapshot)]);
    assert_eq!(count(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_goes_through_all_of_sharing() {
    let cloud = cloud().await;
    let id = cloud.snapshot.clone();
    other(&cloud, &format!("image show {id}")).await.ends(2, &["there is no image"]);
    other(&cloud, &format!("accept {id}")).await.ends(2, &["is shared with this project: virta image list --shared"]);
    for (wrong, texts) in [
        ("third-project", vec!["is no project's id", "openstack project show -f value -c id NAME"]),
        ("demo", vec!["is this project itself"]),
        (PROJECT_ID, vec!["is this project itself"]),
    ] {
        mini(&cloud, &format!("share snap {wrong}")).await.ends(2, &texts);
    }
    let visibility = || cloud.service.images()[0]["visibility"].clone();
    assert_eq!(visibility(), "private", "nothing was changed for a project that does not exist");
    let shared = mini(&cloud, &format!("share snap {OTHER_PROJECT_ID}")).await;
    shared.ends(
        0,
        &["becomes shared first", "remains of deleted files", "It can read it from now on", &format!("virta accept {id}")],
    );
    assert_eq!(visibility(), "shared");
    // a member reads before it accepts
    other(&cloud, &format!("image show {id} -c name -f value")).await.ends(0, &["snap"]);
    assert_eq!(other(&cloud, "image list -f value").await.stdout, "");
    other(&cloud, "image list --shared").await.ends(0, &["pending", &id, "virta accept ID", PROJECT_ID]);
    mini(&cloud, "members snap -f value").await.ends(0, &[&format!("{OTHER_PROJECT_ID} pending")]);
    other(&cloud, "accept snap").await.ends(0, &["accepted", "is in this project's lists"]);
    other(&cloud, "image list -f value -c id").await.ends(0, &[&id]);
    // it is still not the member's to share or to delete
    other(&cloud, &format!("share {id} {PROJECT_ID}")).await.ends(1, &["only its owner can share it", "virta convert glance:"]);
    other(&cloud, &format!("image delete {id} --yes")).await.ends(1, &["belongs to another project", "virta reject"]);
    other(&cloud, "reject snap").await.ends(0, &["rejected", "out of this project's lists"]);
    mini(&cloud, "members snap").await.ends(0, &["rejected", "is shared, with 1 member"]);
    mini(&cloud, &format!("share snap {OTHER_PROJECT_ID}")).await.ends(0, &["snap is shared with project", "already"]);
    mini(&cloud, &format!("unshare snap {OTHER_PROJECT_ID}")).await.ends(0, &["no longer shared"]);
    other(&cloud, &format!("image show {id}")).await.ends(2, &["there is no image"]);
    mini(&cloud, &format!("unshare snap {OTHER_PROJECT_ID}")).await.ends(0, &["was not shared"]);
    // everybody can read those already
    cloud.service.set(&id, "visibility", json!("community"));
    mini(&cloud, &format!("share snap {OTHER_PROJECT_ID}")).await.ends(1, &["is community", "has no members"]);
}
