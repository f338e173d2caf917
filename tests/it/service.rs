//! As a service: what systemd is told, how the unit is hardened, and where it runs that has next to nothing.

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::support::http::Site;
use crate::support::schema::Shape;
use crate::support::sidecar::binary;
use crate::support::stage::Stage;
use crate::support::wait::{until, within};

const DEADLINE: Duration = Duration::from_secs(60);

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

#[tokio::test(flavor = "multi_thread")]
async fn systemd_is_told_when_it_is_ready_that_it_lives_and_when_it_stops() {
    let stage = Stage::shared(Shape::Entity).await;
    stage.launch().must(&["setup"]);
    let path = stage.folder().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_nonblocking(true).unwrap();
    // As systemd does, which tells each process its own number.
    let mut sidecar = Command::new("sh")
        .args(["-c", "WATCHDOG_PID=$$ exec \"$0\" run"])
        .arg(binary())
        .envs(stage.launch().settings())
        .env("NOTIFY_SOCKET", &path)
        .env("WATCHDOG_USEC", "300000")
        .stderr(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let told = async |what: &str| {
        until(what, DEADLINE, async || {
            let mut bytes = [0; 256];
            let length = socket.recv(&mut bytes).ok()?;
            String::from_utf8_lossy(&bytes[..length]).contains(what).then_some(())
        })
        .await;
    };
    told("READY=1").await;
    told("WATCHDOG=1").await;
    told("WATCHDOG=1").await;
    Command::new("sh").args(["-c", &format!("kill -TERM {}", sidecar.id())]).status().unwrap();
    told("STOPPING=1").await;
    assert!(until("it ends", DEADLINE, async || sidecar.try_wait().unwrap()).await.success());
}

#[test]
fn the_unit_is_sound_and_exposed_to_little() {
    let unit = root().join("deploy/systemd/highwater.service");
    let output = Command::new("systemd-analyze").args(["security", "--offline=yes"]).arg(&unit).output();
    let text = String::from_utf8_lossy(&output.expect("systemd-analyze: run `scripts/setup browser`").stdout)
        .into_owned();
    let level = text
        .lines()
        .last()
        .and_then(|line| line.split("highwater.service: ").nth(1)?.split(' ').next()?.parse::<f64>().ok());
    assert!(level.is_some_and(|level| level <= 2.0), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn it_runs_with_a_root_that_is_read_only_any_user_and_no_home() {
    let stage = Stage::shared(Shape::Entity).await;
    stage.launch().must(&["setup"]);
    let storage = stage.storage();
    let owned = Command::new("chown").args(["-R", "54321:54321"]).arg(&storage).status();
    assert!(owned.is_ok_and(|status| status.success()), "chown, which takes root");
    give_away(stage.folder());
    // The folders above the program's own may be closed to others.
    let program = stage.folder().join("program");
    std::fs::copy(binary(), &program).unwrap();
    // All of the file system is read-only but the archive, and the user is nobody's: as containers are run.
    let script = "mount --rbind / / && mount -o remount,bind,ro / && mount --bind \"$1\" \"$1\" && mount -o remount,bind,rw \"$1\" \
                  && cd / && exec setpriv --reuid=54321 --regid=54321 --clear-groups --no-new-privs \"$2\" run";
    let log = stage.folder().join("container.log");
    let output = std::fs::File::create(&log).unwrap();
    let mut child = Command::new("unshare")
        .args(["--mount", "sh", "-ec", script, "container"])
        .args([&storage, &program])
        .env_clear()
        .envs(stage.launch().settings())
        .env("PATH", std::env::var("PATH").unwrap())
        .stdout(output.try_clone().unwrap())
        .stderr(output)
        .spawn()
        .expect("unshare");
    let url = until("it serves", DEADLINE, async || {
        let log = std::fs::read_to_string(&log).unwrap();
        assert!(child.try_wait().unwrap().is_none(), "{log}");
        Some(log.split("serving ").nth(1)?.split_whitespace().next()?.to_owned())
    })
    .await;
    let site = Site::new(&url);
    let ready = within(DEADLINE, async || (site.get("/readyz").await.status == 200).then_some(())).await;
    assert!(
        ready.is_some(),
        "{}\n{}",
        site.get("/readyz").await.text(),
        std::fs::read_to_string(&log).unwrap()
    );
    stage.assert_archived(DEADLINE).await;
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Lets every user write there.
fn give_away(folder: &Path) {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o777)).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn shells_and_man_know_the_command_line() {
    let stage = Stage::shared(Shape::Entity).await;
    for (shell, check) in [("bash", Some("bash")), ("zsh", None), ("fish", None)] {
        let script = stage.launch().must(&["completions", shell]);
        assert!(script.contains("highwater") && script.contains("watermarks"), "{shell}");
        if let Some(check) = check {
            let path = stage.folder().join(shell);
            std::fs::write(&path, &script).unwrap();
            assert!(Command::new(check).arg("-n").arg(&path).status().unwrap().success(), "{shell}");
        }
    }
    let page = stage.launch().must(&["man"]);
    for part in [".TH", "HIGHWATER RUN", "HIGHWATER QUERY", "max\\-lag"] {
        assert!(page.contains(part), "{part} in {page:.2000}");
    }
}
