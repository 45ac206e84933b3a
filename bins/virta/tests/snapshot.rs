//! `virta snapshot` against an embedded Nova that follows the Compute API's states and refusals.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod common;

use std::time::Duration;

use common::{Cloud, Run, signal};
use rustix::process::Signal;

/// A cloud with a running server.
async fn cloud() -> (Cloud, String) {
    let cloud = Cloud::start_with(8, mini_glance::Config::default(), |_| {}).await;
    let id = cloud.service.add_server("web", &cloud.snapshot);
    (cloud, id)
}

fn state(cloud: &Cloud, id: &str) -> (String, Option<String>) {
    cloud.service.server_state(id)
}

fn is(status: &str) -> (String, Option<String>) {
    (status.to_owned(), None)
}

fn actions(cloud: &Cloud) -> usize {
    cloud.service.requests().iter().filter(|request| request.starts_with("POST") && request.ends_with("/action")).count()
}

async fn until(cloud: &Cloud, id: &str, what: impl Fn(&(String, Option<String>)) -> bool) {
    for _ in 0..800 {
        if what(&state(cloud, id)) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("the server never came there: {:?}", state(cloud, id));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_server_is_stopped_imaged_and_started_again_with_either_microversion() {
    for old in [false, true] {
        let (cloud, id) = cloud().await;
        cloud.service.nova(|nova| nova.no_microversions = old);
        cloud.service.server(&id, |server| {
            server.ephemeral_gib = 20;
            server.volumes = vec!["vol-1".to_owned()];
        });
        let run = cloud.run(&["snapshot", "web", "web-1", "--yes", "-f", "value"]).await;
        run.ends(
            0,
            &["is stopped", "not in the image: the ephemeral disk of 20 GiB; 1 attached volumes (vol-1)", "ACTIVE again"],
        );
        assert_eq!(state(&cloud, &id), is("ACTIVE"));
        let made = cloud.others();
        assert_eq!(made.len(), 1);
        assert_eq!((made[0]["name"].as_str(), made[0]["status"].as_str()), (Some("web-1"), Some("active")));
        assert_eq!(run.stdout.trim(), made[0]["id"].as_str().unwrap());
        assert_eq!(actions(&cloud), 3, "stop, createImage, start");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_servers_state_is_kept_whatever_it_was() {
    for (vm_state, status, warning) in [
        ("stopped", "SHUTOFF", "stays so"),
        ("paused", "PAUSED", "what is in the guest's memory is not in the image"),
        ("suspended", "SUSPENDED", "what is in the guest's memory is not in the image"),
    ] {
        let (cloud, id) = cloud().await;
        cloud.service.server(&id, |server| server.vm_state = vm_state);
        cloud.run(&["snapshot", "--name", "web-1", &id]).await.ends(0, &[warning]);
        assert_eq!(state(&cloud, &id), is(status));
        assert_eq!(actions(&cloud), 1, "createImage alone");
    }
    let (cloud, id) = cloud().await;
    cloud.run(&["snapshot", "--live", "web", "web-1"]).await.ends(0, &["as after a power cut"]);
    assert_eq!((state(&cloud, &id), actions(&cloud)), (is("ACTIVE"), 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_imaged_is_refused_before_anything_is_done() {
    let (cloud, id) = cloud().await;
    let refused = async |texts: &[&str], code: i32| {
        cloud.run(&["snapshot", &id, "new", "--yes"]).await.ends(code, texts);
        assert_eq!((actions(&cloud), cloud.others().len()), (0, 0));
    };
    cloud.service.server(&id, |server| server.locked = true);
    refused(&["is locked", "openstack server unlock"], 1).await;
    cloud.service.server(&id, |server| {
        server.locked = false;
        server.task_state = Some("migrating");
    });
    refused(&["is busy (migrating)"], 1).await;
    cloud.service.server(&id, |server| {
        server.task_state = None;
        server.vm_state = "resized";
    });
    refused(&["is VERIFY_RESIZE", "ACTIVE, SHUTOFF, PAUSED or SUSPENDED"], 1).await;
    cloud.service.server(&id, |server| {
        server.vm_state = "active";
        server.image = String::new();
        server.volumes = vec!["root-volume".to_owned()];
    });
    refused(&["is a volume", "--volume root-volume --force --disk-format qcow2"], 1).await;
    cloud.run(&["snapshot", "nobody", "new", "--yes"]).await.ends(2, &["there is no server nobody"]);
    cloud.service.add_server("web", "x");
    cloud.run(&["snapshot", "web", "new", "--yes"]).await.ends(2, &["there are 2 servers called web", &id]);
    cloud.service.server(&id, |server| server.image = "x".to_owned());
    cloud.run(&["snapshot", &id, "snap", "--yes"]).await.ends(2, &["there is an image called snap already", "--force"]);
    cloud.run(&["snapshot", &id, "new"]).await.ends(2, &["Stop server web", "add --yes"]);
    cloud.run(&["snapshot", &id]).await.ends(2, &["required"]);
    assert_eq!((actions(&cloud), cloud.others().len()), (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_nova_gives_up_is_told_in_its_words_and_the_server_comes_back() {
    for suspended in [false, true] {
        let (cloud, id) = cloud().await;
        cloud.service.nova(|nova| {
            nova.failing_snapshots = 1;
            nova.leaves_suspended = suspended;
        });
        let run = cloud.run(&["snapshot", "web", "web-1", "--yes"]).await;
        run.ends(
            1,
            &[
                "Nova gave the snapshot up",
                "Insufficient free space",
                if suspended { "is resumed again" } else { "is started again" },
            ],
        );
        assert_eq!((state(&cloud, &id), cloud.others().len()), (is("ACTIVE"), 0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_does_not_stop_in_time_is_said_to_have_been_cut_off() {
    let (cloud, id) = cloud().await;
    cloud.service.set(&cloud.snapshot, "os_shutdown_timeout", serde_json::json!("1"));
    cloud.service.nova(|nova| nova.stopping = Duration::from_millis(1200));
    cloud.run(&["snapshot", "web", "web-1", "--yes"]).await.ends(0, &["cuts one off after 1 s", "may not be clean"]);
    assert_eq!(state(&cloud, &id), is("ACTIVE"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_answer_and_a_stumbling_service_make_one_image() {
    let (cloud, id) = cloud().await;
    cloud.service.nova(|nova| {
        nova.lost_answers = 1;
        nova.failing_actions = 2;
    });
    cloud.run(&["snapshot", "web", "web-1", "--yes"]).await.ends(0, &["looking for the image"]);
    assert_eq!((state(&cloud, &id), cloud.others().len()), (is("ACTIVE"), 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupt_at_any_moment_leaves_the_server_as_it_was_and_no_image() {
    let (cloud, id) = cloud().await;
    cloud.service.nova(|nova| {
        nova.stopping = Duration::from_millis(300);
        nova.step = Duration::from_millis(150);
    });
    for moment in 0..12_u64 {
        let child = cloud.command(&["snapshot", "web", &format!("web-{moment}"), "--yes"]).spawn().unwrap();
        let before = actions(&cloud);
        for _ in 0..400 {
            if actions(&cloud) > before {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        tokio::time::sleep(Duration::from_millis(moment * 90)).await;
        signal(&child, Signal::INT);
        let run = Run::new(child.wait_with_output().await.unwrap(), Duration::ZERO);
        assert_eq!(state(&cloud, &id), is("ACTIVE"), "moment {moment}: {}", run.stderr);
        assert!(run.code == Some(130) || run.code == Some(0), "{:?} {}", run.code, run.stderr);
        let unfinished = cloud.others().into_iter().filter(|image| image["status"] != "active").count();
        assert_eq!(unfinished, 0, "moment {moment}: {}", run.stderr);
        if run.code == Some(130) {
            assert!(run.stderr.contains("the server is as it was found"), "{}", run.stderr);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_interrupt_leaves_at_once_with_the_command_that_helps() {
    let (cloud, id) = cloud().await;
    cloud.service.nova(|nova| nova.dying_snapshots = 1); // its task never ends
    let child = cloud.command(&["snapshot", "web", "web-1", "--yes"]).spawn().unwrap();
    until(&cloud, &id, |(_, task)| task.as_deref() == Some("image_pending_upload")).await;
    signal(&child, Signal::INT);
    tokio::time::sleep(Duration::from_millis(1300)).await;
    signal(&child, Signal::INT);
    let run = Run::new(child.wait_with_output().await.unwrap(), Duration::ZERO);
    run.ends(130, &["brought back to ACTIVE", &format!("openstack server start {id}"), "virta clean"]);
    assert_eq!(cloud.others().len(), 0, "the unfinished image is gone already");
    // the host is back, and so is the next command
    cloud.service.server(&id, |server| server.task_state = None);
    cloud.run(&["clean"]).await.ends(0, &["which it had found ACTIVE", "is started again"]);
    assert_eq!(state(&cloud, &id), is("ACTIVE"));
    cloud.run(&["clean"]).await.ends(0, &["nothing to clean"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_kill_clean_or_the_same_command_brings_the_server_back() {
    for with_clean in [true, false] {
        let (cloud, id) = cloud().await;
        cloud.service.nova(|nova| nova.step = Duration::from_millis(400));
        let mut child = cloud.command(&["snapshot", "web", "web-1", "--yes"]).spawn().unwrap();
        until(&cloud, &id, |(_, task)| task.as_deref() == Some("image_snapshot")).await;
        child.kill().await.unwrap();
        assert_eq!(state(&cloud, &id).0, "SHUTOFF");
        if with_clean {
            cloud.run(&["clean"]).await.ends(0, &["removed the unfinished image", "ACTIVE again"]);
            assert_eq!((state(&cloud, &id), cloud.others().len()), (is("ACTIVE"), 0));
        } else {
            cloud.run(&["snapshot", "web", "web-1", "--yes"]).await.ends(0, &["was killed while", "ACTIVE again"]);
            assert_eq!((state(&cloud, &id), cloud.others().len()), (is("ACTIVE"), 1));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn convert_goes_on_to_a_qcow2_and_the_raw_image_goes_only_if_that_worked() {
    let (cloud, id) = cloud().await;
    let disk = std::sync::Arc::new(cloud.raw.clone());
    cloud.service.server(&id, |server| server.disk = disk.clone());
    cloud
        .run(&["snapshot", "--convert", "web", "web-1", "--yes", "--compress", "zstd"])
        .await
        .ends(0, &["proven", "the raw image is deleted"]);
    let made = cloud.others();
    assert_eq!(made.len(), 1, "{made:?}");
    assert_eq!((made[0]["name"].as_str(), made[0]["disk_format"].as_str()), (Some("web-1"), Some("qcow2")));
    assert_eq!(made[0]["instance_uuid"], id.as_str());
    cloud.assert_is_the_disk(&cloud.service.data_path(made[0]["id"].as_str().unwrap()).unwrap());
    assert_eq!(state(&cloud, &id), is("ACTIVE"));

    cloud.service.faults(|faults| faults.refuse_format = true);
    let run = cloud.run(&["snapshot", "--convert", "web", "web-2", "--yes"]).await;
    run.ends(1, &["the snapshot is there as raw image", "virta convert --delete-source glance:"]);
    let raw: Vec<_> = cloud.others().into_iter().filter(|image| image["name"] == "web-2-virta-raw").collect();
    assert_eq!((raw.len(), raw[0]["status"].as_str()), (1, Some("active")));
    // the command that it prints goes on
    cloud.service.faults(|faults| faults.refuse_format = false);
    let line = run.stderr.lines().find(|line| line.contains("to go on: virta")).unwrap();
    let mut words: Vec<&str> = line.split("virta ").last().unwrap().split(' ').collect();
    words.push("--yes");
    cloud.run(&words).await.ends(0, &["the raw image is deleted"]);
    assert_eq!(state(&cloud, &id), is("ACTIVE"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_somebody_else_did_to_the_server_stays() {
    // stopped by its owner while it is imaged alive: it is not started again
    let (cloud, id) = cloud().await;
    cloud.service.nova(|nova| nova.step = Duration::from_millis(300));
    let child = cloud.command(&["snapshot", "--live", "web", "web-1"]).spawn().unwrap();
    until(&cloud, &id, |(_, task)| task.as_deref() == Some("image_snapshot")).await;
    cloud.service.server(&id, |server| server.vm_state = "stopped");
    Run::new(child.wait_with_output().await.unwrap(), Duration::ZERO)
        .ends(0, &["is SHUTOFF, which this run did not do: it stays so"]);
    assert_eq!(state(&cloud, &id), is("SHUTOFF"));
    // gone: the image is what is left
    cloud.service.server(&id, |server| server.vm_state = "active");
    let child = cloud.command(&["snapshot", "--live", "web", "web-2"]).spawn().unwrap();
    until(&cloud, &id, |(_, task)| task.as_deref() == Some("image_uploading")).await;
    cloud.service.server(&id, |server| server.project = mini_glance::identity::OTHER_PROJECT_ID);
    Run::new(child.wait_with_output().await.unwrap(), Duration::ZERO).ends(0, &["is gone: somebody deleted it", "is active"]);
    // started again by somebody before the image was asked for: no image of a running server that nobody knows of
    cloud.service.server(&id, |server| server.project = mini_glance::identity::PROJECT_ID);
    cloud.service.nova(|nova| nova.stopping = Duration::from_millis(400));
    let child = cloud.command(&["snapshot", "web", "web-3", "--yes"]).spawn().unwrap();
    until(&cloud, &id, |(_, task)| task.as_deref() == Some("powering-off")).await;
    cloud.service.nova(|nova| nova.restarts = true);
    Run::new(child.wait_with_output().await.unwrap(), Duration::ZERO).ends(1, &["somebody started it again"]);
    assert_eq!((state(&cloud, &id), cloud.others().iter().filter(|image| image["name"] == "web-3").count()), (is("ACTIVE"), 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_to_stop_that_is_lost_is_no_reason_to_give_up() {
    let (cloud, id) = cloud().await;
    // heard, and answered with 503: the second request gets 409
    cloud.service.nova(|nova| nova.lost_stops = 1);
    cloud.run(&["snapshot", "web", "web-1", "--yes"]).await.ends(0, &["ACTIVE again"]);
    assert_eq!((state(&cloud, &id), cloud.others().len()), (is("ACTIVE"), 1));
    cloud.run(&["snapshot", "web", "web-2", "--yes", "--compress", "zlib"]).await.ends(2, &["add --convert"]);
    // two at once: the one that comes second changes nothing, and the first has its image of a stopped server
    cloud.service.nova(|nova| nova.stopping = Duration::from_millis(600));
    let first = cloud.command(&["snapshot", "web", "web-3", "--yes"]).spawn().unwrap();
    until(&cloud, &id, |(_, task)| task.as_deref() == Some("powering-off")).await;
    cloud.run(&["snapshot", "web", "web-4", "--yes"]).await.ends(2, &["makes a snapshot of this server just now"]);
    Run::new(first.wait_with_output().await.unwrap(), Duration::ZERO).ends(0, &["ACTIVE again"]);
}
