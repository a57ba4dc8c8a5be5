//! Where sessions run: devices, and the groups of instances that ask for them.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Code, Error};

/// Where a session runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    #[default]
    Cpu,
    /// An NVIDIA GPU by index.
    Cuda(u32),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl std::str::FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "cpu" {
            return Ok(Device::Cpu);
        }
        text.strip_prefix("cuda:")
            .and_then(|index| index.parse().ok())
            .map(Device::Cuda)
            .ok_or_else(|| format!("device '{text}' must be \"cpu\" or \"cuda:N\""))
    }
}

impl Serialize for Device {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Device {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for Device {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Device".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": "string" })
    }
}

/// Copies of a model on devices of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct InstanceGroup {
    /// Copies; on GPUs so many on each. Default: what `profile` says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub count: Option<usize>,
    pub kind: DeviceKind,
    /// Indices of the GPUs to use. Default: every one.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub gpus: Vec<u32>,
}

/// What kind of device a group of instances asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// The GPUs when there are any, else the CPU.
    #[default]
    Auto,
    Cpu,
    Gpu,
}

impl InstanceGroup {
    /// The devices of a group on a machine with `gpus` GPUs.
    ///
    /// # Errors
    /// `NotReady` when a GPU is asked for that is not there.
    pub fn devices(&self, gpus: usize) -> Result<Vec<Device>, Error> {
        let all = || (0..u32::try_from(gpus).unwrap_or(u32::MAX)).map(Device::Cuda).collect();
        match self.kind {
            DeviceKind::Cpu => Ok(vec![Device::Cpu]),
            DeviceKind::Auto if gpus == 0 => Ok(vec![Device::Cpu]),
            DeviceKind::Gpu if gpus == 0 => {
                Err(Error::new(Code::NotReady, "instance_group asks for a GPU, and no GPU can be used here"))
            }
            DeviceKind::Auto | DeviceKind::Gpu if self.gpus.is_empty() => Ok(all()),
            DeviceKind::Auto | DeviceKind::Gpu => match self.gpus.iter().find(|&&index| index as usize >= gpus) {
                Some(index) => {
                    let message = format!("instance_group asks for GPU {index}, and the GPUs are 0 to {}", gpus - 1);
                    Err(Error::new(Code::NotReady, message))
                }
                None => Ok(self.gpus.iter().copied().map(Device::Cuda).collect()),
            },
        }
    }
}

/// The NVIDIA GPUs that the kernel's driver offers here.
pub(super) fn nvidia_gpus() -> usize {
    let is_device = |name: &str| name.strip_prefix("nvidia").is_some_and(|number| number.parse::<u32>().is_ok());
    let entries = std::fs::read_dir("/dev").into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_name().to_str().is_some_and(is_device)).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_parse() {
        assert_eq!("cuda:1".parse(), Ok(Device::Cuda(1)));
        assert!("gpu".parse::<Device>().is_err());
        assert_eq!(Device::Cuda(0).to_string(), "cuda:0");
    }

    #[test]
    fn groups_find_their_devices() {
        let devices = |kind, gpus: &[u32], there| {
            InstanceGroup { kind, gpus: gpus.to_vec(), count: None }.devices(there).map_err(|error| error.message)
        };
        assert_eq!(devices(DeviceKind::Cpu, &[], 2), Ok(vec![Device::Cpu]));
        assert_eq!(devices(DeviceKind::Auto, &[], 0), Ok(vec![Device::Cpu]));
        assert_eq!(devices(DeviceKind::Auto, &[], 2), Ok(vec![Device::Cuda(0), Device::Cuda(1)]));
        assert_eq!(devices(DeviceKind::Gpu, &[1], 2), Ok(vec![Device::Cuda(1)]));
        assert!(devices(DeviceKind::Gpu, &[], 0).unwrap_err().contains("no GPU"));
        assert!(devices(DeviceKind::Gpu, &[2], 2).unwrap_err().contains("GPU 2, and the GPUs are 0 to 1"));
    }
}
