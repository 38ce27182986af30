//! The leash: what ends the children of a process that was killed.
//!
//! The kernel's parent-death signal reaches direct children only. A compiler that ninja or CMake
//! started, a subprocess of pip, an engine behind a script: these outlive a `kill -9` of ours. So
//! every child is started with a mark in its environment, which everything that it starts inherits,
//! and a watcher waits for our end:
//!
//! ```text
//! we ──fork──► watcher: reads a pipe that only we hold open
//!  │                     end of file ──► a moment for those that tidy up ──► KILL to every
//!  └─spawn──► child ──► grandchild …     process that carries the mark, until there is none
//! ```
//!
//! The watcher is a fork of this process that executes nothing else: a library knows no program
//! that it could start instead. It owns no files, so it holds neither ports nor locks nor pipes of
//! ours, is in a session of its own, and ignores every signal that can be ignored. Other threads
//! may have held locks when it was forked, so it makes system calls only: it allocates nothing and
//! cannot panic. It ends by itself as soon as we have ended and no marked process is left.
//!
//! An owner that was itself started by an owner ends with that one: so it is meant.
//!
//! Not reached is a process that both wiped its environment and left its parents behind, or whose
//! environment the kernel does not show to us (it runs as another user).

use std::sync::OnceLock;

/// The mark's name in a child's environment.
pub(super) const NAME: &str = "LLAMA_ORCH_OWNER";

/// The mark's value: which process owns the child. Process ids are used again, so the start time
/// goes with it.
pub(super) fn owner() -> &'static str {
    static OWNER: OnceLock<String> = OnceLock::new();
    OWNER.get_or_init(|| {
        let pid = std::process::id();
        let start = super::ProcessIdentity::own().map_or(0, |own| own.start_time_ticks);
        format!("{pid}-{start}")
    })
}

#[cfg(target_os = "linux")]
pub(super) use linux::Leash;

/// Other systems have the parent-death signal's stand-ins at most.
#[cfg(not(target_os = "linux"))]
#[derive(Debug, Default)]
pub(super) struct Leash;

#[cfg(not(target_os = "linux"))]
impl Leash {
    pub(super) fn hold(&mut self) {}
}

#[cfg(target_os = "linux")]
mod linux {
    use std::ffi::CStr;
    use std::io::{self, PipeWriter};
    use std::os::fd::{AsRawFd as _, RawFd};

    use nix::errno::Errno;
    use nix::libc;
    use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
    use nix::unistd::{ForkResult, Pid, fork};

    /// What ends by itself when it is told (ninja) gets this long, in steps of [`STEP`].
    const GRACE_STEPS: u32 = 20;
    /// Between two looks, in nanoseconds: 15 ms.
    const STEP: libc::c_long = 15_000_000;
    /// Looks at most, about ten seconds: a process that is stuck in the kernel is not waited for.
    const MOST_STEPS: u32 = 600;
    /// Longest mark, its name and the closing zero included.
    const MARK: usize = 96;
    const PIECE: usize = 4096;
    /// What a watcher is called.
    const WATCHER: &CStr = c"owner-watch";

    /// Our end of the leash: the watcher, and the pipe that closes with this process.
    #[derive(Debug, Default)]
    pub(in super::super) struct Leash(Option<(Pid, PipeWriter)>);

    impl Leash {
        /// Makes sure that the watcher is there. Without one a killed process may leave
        /// grandchildren behind, which is no reason not to start what is to be started.
        pub(in super::super) fn hold(&mut self) {
            if let Some((watcher, _)) = &self.0
                && matches!(
                    waitpid(*watcher, Some(WaitPidFlag::WNOHANG)),
                    Ok(WaitStatus::StillAlive)
                )
            {
                return;
            }
            match start() {
                Ok(held) => self.0 = Some(held),
                Err(error) => {
                    tracing::warn!(%error, "nobody watches over what this process starts");
                }
            }
        }
    }

    #[allow(unsafe_code)]
    fn start() -> io::Result<(Pid, PipeWriter)> {
        let mut mark = [0u8; MARK];
        let text = format!("{}={}", super::NAME, super::owner());
        let length = text.len() + 1;
        mark.get_mut(..text.len())
            .ok_or(io::ErrorKind::InvalidInput)?
            .copy_from_slice(text.as_bytes());
        let (reader, writer) = io::pipe()?;
        // SAFETY: the child calls `watch` alone, which makes system calls on memory of its own
        // stack, neither allocates nor locks nor panics, and never returns.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => Ok((child, writer)),
            ForkResult::Child => watch(reader.as_raw_fd(), mark.get(..length).unwrap_or(&mark)),
        }
    }

    /// The watcher's whole life.
    #[allow(unsafe_code)]
    fn watch(pipe: RawFd, mark: &[u8]) -> ! {
        // SAFETY: plain system calls on descriptors and buffers of this function's own.
        unsafe {
            libc::setsid();
            libc::prctl(libc::PR_SET_NAME, WATCHER.as_ptr());
            ignore_signals();
            keep_only(pipe);
            let mut byte = 0u8;
            loop {
                let count = libc::read(PIPE, (&raw mut byte).cast(), 1);
                if count == 0 {
                    break;
                }
                // What is no end of file is no word of our end: better a watcher less than one
                // that kills what a living owner runs.
                if count < 0 && Errno::last() != Errno::EINTR {
                    libc::_exit(1);
                }
            }
        }
        let mut clear = 0;
        for step in 0..MOST_STEPS {
            if sweep(mark, step >= GRACE_STEPS) == 0 {
                clear += 1;
                // A process may have been born behind the back of one look, not of two.
                if clear == 2 {
                    break;
                }
                continue;
            }
            clear = 0;
            // SAFETY: sleeps; the structure is read before the call returns.
            unsafe {
                let pause = libc::timespec {
                    tv_sec: 0,
                    tv_nsec: STEP,
                };
                libc::nanosleep(&raw const pause, std::ptr::null_mut());
            }
        }
        // SAFETY: ends the process at once; handlers at exit are the parent's, not ours.
        unsafe { libc::_exit(0) }
    }

    /// Where the pipe lies once everything else is closed.
    const PIPE: RawFd = 3;

    /// # Safety
    /// For a process of one thread that uses none of its files but the pipe.
    #[allow(unsafe_code)]
    unsafe fn keep_only(pipe: RawFd) {
        // SAFETY: as the caller promises.
        unsafe {
            // None of this needs a descriptor that is free: they may be used up.
            libc::dup2(pipe, PIPE);
            let first = (PIPE + 1).cast_unsigned();
            if libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) != 0 {
                for file in PIPE + 1..65_536 {
                    libc::close(file);
                }
            }
            for standard in 0..PIPE {
                libc::close(standard);
            }
            // The lowest that is free, which is 0.
            let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDWR);
            for standard in 1..PIPE {
                libc::dup2(null, standard);
            }
        }
    }

    /// # Safety
    /// For a process that has nobody's handlers to keep.
    #[allow(unsafe_code)]
    unsafe fn ignore_signals() {
        for signal in 1..=64 {
            let action = match signal {
                libc::SIGSEGV | libc::SIGBUS | libc::SIGFPE | libc::SIGILL | libc::SIGABRT => {
                    libc::SIG_DFL
                }
                _ => libc::SIG_IGN,
            };
            // SAFETY: sets a disposition; those that cannot be set are refused.
            unsafe { libc::signal(signal, action) };
        }
    }

    /// Looks at every process once and returns how many carry the mark; `kill` ends them.
    #[allow(unsafe_code)]
    fn sweep(mark: &[u8], kill: bool) -> u32 {
        #[repr(align(8))]
        struct Entries([u8; PIECE]);
        let mut entries = Entries([0; PIECE]);
        let mut found = 0;
        // SAFETY: system calls that write to the buffer given, within its length.
        unsafe {
            let directory = libc::open(c"/proc".as_ptr(), libc::O_RDONLY | libc::O_DIRECTORY);
            if directory < 0 {
                return 0;
            }
            let own = libc::getpid();
            loop {
                let start = entries.0.as_mut_ptr();
                let read = libc::syscall(libc::SYS_getdents64, directory, start, PIECE);
                let Ok(read @ 1..) = usize::try_from(read) else {
                    break;
                };
                let mut rest = entries.0.get(..read).unwrap_or_default();
                while let Some((name, next)) = entry(rest) {
                    rest = next;
                    if let Some(pid) = number(name)
                        && pid != own
                        && end_marked(pid, mark, kill)
                    {
                        found += 1;
                    }
                }
            }
            libc::close(directory);
        }
        found
    }

    /// The first directory entry's name and what follows it, as the kernel packs them: 8 bytes of
    /// inode, 8 of offset, 2 of length, 1 of type, the name, a zero.
    fn entry(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
        let length = u16::from_ne_bytes([*bytes.get(16)?, *bytes.get(17)?]);
        let (this, next) = bytes.split_at_checked(usize::from(length))?;
        let name = this.get(19..)?;
        let end = name.iter().position(|byte| *byte == 0)?;
        Some((name.get(..end)?, next))
    }

    fn number(name: &[u8]) -> Option<libc::pid_t> {
        let mut pid: libc::pid_t = 0;
        for digit in name {
            if !digit.is_ascii_digit() {
                return None;
            }
            let digit = libc::pid_t::from(digit.wrapping_sub(b'0'));
            pid = pid.checked_mul(10)?.checked_add(digit)?;
        }
        (pid > 1).then_some(pid)
    }

    /// Whether the process carries the mark; with `kill` it is ended. The process is held by a
    /// descriptor meanwhile, so that its id cannot come to mean another one in between.
    ///
    /// Where an owner was itself started by an owner, its watcher carries the outer mark, too. It
    /// is left alone: it ends by itself, once it has ended what its own owner started.
    #[allow(unsafe_code)]
    fn end_marked(pid: libc::pid_t, mark: &[u8], kill: bool) -> bool {
        // SAFETY: system calls on descriptors that are opened and closed here.
        unsafe {
            let handle = libc::syscall(libc::SYS_pidfd_open, pid, 0);
            let handle = RawFd::try_from(handle).unwrap_or(-1);
            let marked = carries(pid, mark) && !is_watcher(pid);
            if marked && kill {
                if handle >= 0 {
                    let none = std::ptr::null_mut::<libc::siginfo_t>();
                    libc::syscall(libc::SYS_pidfd_send_signal, handle, libc::SIGKILL, none, 0);
                } else {
                    libc::kill(pid, libc::SIGKILL);
                }
            }
            if handle >= 0 {
                libc::close(handle);
            }
            marked
        }
    }

    /// Whether `/proc/<pid>/environ` holds the mark. A process that has ended holds nothing.
    #[allow(unsafe_code)]
    fn carries(pid: libc::pid_t, mark: &[u8]) -> bool {
        let path = proc_path(pid, b"/environ");
        let mut buffer = [0u8; PIECE + MARK];
        let mut kept = 0;
        // SAFETY: the path ends with a zero; the kernel writes within the length given.
        unsafe {
            let file = libc::open(path.as_ptr().cast(), libc::O_RDONLY);
            if file < 0 {
                return false;
            }
            let mut found = false;
            while let Some(free) = buffer.get_mut(kept..) {
                let read = libc::read(file, free.as_mut_ptr().cast(), free.len());
                let Ok(read @ 1..) = usize::try_from(read) else {
                    break;
                };
                let filled = kept + read;
                found = buffer
                    .get(..filled)
                    .is_some_and(|bytes| bytes.windows(mark.len()).any(|part| part == mark));
                if found {
                    break;
                }
                // The mark may lie across two pieces.
                let keep = filled.min(mark.len());
                buffer.copy_within(filled - keep..filled, 0);
                kept = keep;
            }
            libc::close(file);
            found
        }
    }

    /// Whether the process is somebody's watcher, by its name.
    #[allow(unsafe_code)]
    fn is_watcher(pid: libc::pid_t) -> bool {
        let path = proc_path(pid, b"/comm");
        let mut name = [0u8; 32];
        // SAFETY: the path ends with a zero; the kernel writes within the length given.
        let read = unsafe {
            let file = libc::open(path.as_ptr().cast(), libc::O_RDONLY);
            if file < 0 {
                return false;
            }
            let read = libc::read(file, name.as_mut_ptr().cast(), name.len());
            libc::close(file);
            read
        };
        let name = usize::try_from(read).ok().and_then(|read| name.get(..read));
        name.and_then(|name| name.strip_suffix(b"\n")) == Some(WATCHER.to_bytes())
    }

    /// `/proc/<pid>`, what is asked of it, and a zero.
    fn proc_path(pid: libc::pid_t, what: &[u8]) -> [u8; 32] {
        let mut path = [0u8; 32];
        let mut digits = [0u8; 10];
        let mut rest = pid.unsigned_abs();
        let mut count = 0;
        for place in &mut digits {
            *place = b'0' + (rest % 10) as u8;
            rest /= 10;
            count += 1;
            if rest == 0 {
                break;
            }
        }
        let digits = digits.iter().take(count).rev();
        let text = b"/proc/".iter().chain(digits).chain(what);
        for (place, byte) in path.iter_mut().zip(text) {
            *place = *byte;
        }
        path
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn paths_and_numbers() {
            let path = proc_path(4_194_304, b"/environ");
            assert_eq!(&path[..22], b"/proc/4194304/environ\0");
            assert_eq!(&proc_path(7, b"/comm")[..13], b"/proc/7/comm\0");
            assert_eq!(number(b"4194304"), Some(4_194_304));
            for none in [&b"self"[..], b"", b"1", b"99999999999"] {
                assert_eq!(number(none), None);
            }
        }

        #[test]
        #[allow(unsafe_code)]
        fn the_pipe_is_kept_though_no_descriptor_is_free() {
            use std::io::Write as _;
            let (reader, mut writer) = io::pipe().unwrap();
            writer.write_all(b"x").unwrap();
            // SAFETY: the child makes system calls on its own stack alone and never returns.
            let child = match unsafe { fork() }.unwrap() {
                ForkResult::Parent { child } => child,
                ForkResult::Child => unsafe {
                    let limit = libc::rlimit {
                        rlim_cur: 4,
                        rlim_max: 4,
                    };
                    libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
                    keep_only(reader.as_raw_fd());
                    let mut byte = 0u8;
                    let count = libc::read(PIPE, (&raw mut byte).cast(), 1);
                    libc::_exit(i32::from(count != 1 || byte != b'x'))
                },
            };
            assert_eq!(waitpid(child, None), Ok(WaitStatus::Exited(child, 0)));
        }

        #[test]
        fn the_watcher_of_an_owner_within_is_left_alone() {
            use std::os::unix::fs::PermissionsExt as _;
            let directory = tempfile::tempdir().unwrap();
            let start = |name: &str| {
                let script = directory.path().join(name);
                std::fs::write(&script, "#!/bin/sh\necho up\nread line\n").unwrap();
                let all = std::fs::Permissions::from_mode(0o755);
                std::fs::set_permissions(&script, all).unwrap();
                std::process::Command::new("/bin/sh")
                    .args(["-c", "exec \"$0\""])
                    .arg(&script)
                    .env("LLAMA_ORCH_TEST", "within")
                    .stdin(std::process::Stdio::piped())
                    .stdout(std::process::Stdio::piped())
                    .spawn()
                    .unwrap()
            };
            let mark = b"LLAMA_ORCH_TEST=within\0";
            for (name, is_ended) in [("owner-watch", false), ("other", true)] {
                let mut child = start(name);
                let mut line = [0; 3];
                let out = child.stdout.as_mut().unwrap();
                io::Read::read_exact(out, &mut line).unwrap();
                let pid = child.id().cast_signed();
                assert_eq!(end_marked(pid, mark, true), is_ended, "{name}");
                drop(child.stdin.take());
                // A shell whose input has ended ends with 1.
                assert_eq!(child.wait().unwrap().code().is_none(), is_ended, "{name}");
            }
        }

        #[test]
        fn a_mark_is_found_in_a_process_that_carries_it_and_in_no_other() {
            let child = |mark: &str| {
                std::process::Command::new("sleep")
                    .arg("600")
                    .env_clear()
                    // So long that the mark lies across two pieces.
                    .env("A", "x".repeat(PIECE + MARK - 20))
                    .env("LLAMA_ORCH_TEST", mark)
                    .env("Z", "x".repeat(3 * PIECE))
                    .spawn()
                    .unwrap()
            };
            let (mut with, mut without) = (child("1-2"), child("1-23"));
            let mark = b"LLAMA_ORCH_TEST=1-2\0";
            let pid = |child: &std::process::Child| child.id().cast_signed();
            assert!(carries(pid(&with), mark));
            assert!(!carries(pid(&without), mark));
            assert!(!end_marked(pid(&without), mark, true));
            assert!(end_marked(pid(&with), mark, true));
            assert!(!with.wait().unwrap().success());
            assert!(without.try_wait().unwrap().is_none());
            without.kill().unwrap();
            without.wait().unwrap();
        }
    }
}
